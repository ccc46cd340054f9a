"""How the bundled model was made: `python -m tools.emoji.train all` (see docs/emoji-model.md)."""
