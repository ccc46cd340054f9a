"""A page in the browser that fits a prompt and shows every step of it."""
