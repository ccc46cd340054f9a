"""A chat model behind any OpenAI-compatible endpoint. Every answer is stored, so none is paid for twice."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipgo import files
from ipgo.errors import InputError, MissingExtraError, first_line
from ipgo.typed import check_types

FIRST_WAIT = 1.0  # seconds before the first further try, doubled for each one after it ...
LONGEST_WAIT = 60.0  # ... up to this many, also if the server asks for more
PASSING = (408, 409, 425, 429)  # statuses that may be others a little later, as may all from 500 on

OPENAI = "https://api.openai.com/v1"
QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»"}
NUMBERED = re.compile(r"^\**\(?\d+[.):]\**\s+")
ITEM = re.compile(rf"{NUMBERED.pattern}|^[-*•]\s+")
LABEL = re.compile(r"^(?:(?:rewritten|improved|new)\s+)?prompt(?:\s*\d+)?\s*:\s*", re.IGNORECASE)
# What comes before the text on its own line, or on the line before it. A prompt, too, may begin with "Here is".
ANNOUNCED = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok)\b[^\w]*)?(?:here\b|this is\b)"
    r"(?:[^:\n]{0,80}\b(?:prompt|version|rewrit\w*|description|caption|result|answer|suggestion|it is|you go)\b"
    r"[^:\n]{0,40}:\s*|[^:\n]{0,120}:\s*\n\s*)",
    re.IGNORECASE,
)
LIST = re.compile(r"(?:^|:)\s*(\[.*\])[\s.,;}]*$", re.DOTALL | re.MULTILINE)
# Some templates put the opening mark into the question, and some answers end before the closing one.
THOUGHTS = [
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"<think(?:ing)?>.*?</think(?:ing)?>",
        r"\A.*</think(?:ing)?>",
        r"<think(?:ing)?>.*\Z",
    )
]
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Chat:
    """Which model is asked, and how patiently.

    The endpoint and the key are those of the environment: OPENAI_BASE_URL (OpenAI's own if unset) and
    OPENAI_API_KEY. An answer that is stored needs no key, and is that of its endpoint.

    Attributes:
        model: its name at the endpoint.
        temperature: of its answers; None leaves it to the model.
        timeout: seconds to wait for an answer.
        retries: further tries after an error, a time-out or a rate limit.
        cache: folder of the stored answers; None is $IPGO_CACHE/chat, or that of the user's cache folder.
    """

    model: str = "gpt-4o"
    temperature: float | None = 0.0
    timeout: float = 60.0
    retries: int = 4
    cache: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "chat.")
        if not self.model.strip():
            raise InputError("chat.model is empty; name a model of the endpoint")
        if self.temperature is not None and not self.temperature >= 0:
            raise InputError(f"chat.temperature is {self.temperature}; it must be at least 0")
        if not self.timeout > 0:
            raise InputError(f"chat.timeout is {self.timeout}; it must be above 0")
        if self.retries < 0:
            raise InputError(f"chat.retries is {self.retries}; it must be at least 0")

    def ask(self, instruction: str, text: str, index: int = 0) -> str:
        """The model's answer to `text` under `instruction` (the system's message).

        Args:
            index: numbers answers to the same question, each of which is asked for and stored on its own.

        Raises:
            InputError: no key, no place to store answers, a refusal, or no answer after all tries.
            MissingExtraError: openai is missing.
        """
        stored = self.stored(instruction, text, index)
        if stored is not None:
            return stored
        self._check_access()
        question = self._question(instruction, text, index)
        answer = self._request(question["messages"])
        files.write_json(self._file(question), {**question, "answer": answer}, alone=False)
        return answer

    def stored(self, instruction: str, text: str, index: int = 0) -> str | None:
        """The answer of an earlier `ask`, or None; a damaged file counts as none."""
        file = self._file(self._question(instruction, text, index))
        if not file.is_file():
            return None
        try:
            return str(files.read_json(file)["answer"])
        except (InputError, KeyError, TypeError):
            logger.warning("stored answer %s is damaged; the model is asked again", file)
            return None

    def forget(self, instruction: str, text: str, index: int = 0) -> None:
        """Do not keep the answer of an earlier `ask`."""
        self._file(self._question(instruction, text, index)).unlink(missing_ok=True)

    def check(self, instruction: str, text: str) -> None:
        """Raise at once what `ask` would raise for want of a key, of the openai package or of a place for answers."""
        if self.stored(instruction, text) is None:
            self._check_access()

    @property
    def folder(self) -> Path:
        """Where answers are stored."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        own = os.environ.get("IPGO_CACHE")
        if own:
            return Path(own).expanduser() / "chat"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipgo" / "chat"

    def _question(self, instruction: str, text: str, index: int) -> dict[str, Any]:
        """All that an answer depends on: "endpoint" where it is not OpenAI's."""
        given = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
        endpoint = "" if given == OPENAI else given
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        return {
            "model": self.model,
            "temperature": self.temperature,
            "index": index,
            "messages": messages,
            **({"endpoint": endpoint} if endpoint else {}),
        }

    def _file(self, question: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest}.json"

    def _check_access(self) -> None:
        if not os.environ.get("OPENAI_API_KEY"):
            raise InputError(
                "OPENAI_API_KEY is not set and no answer is stored; set it, and OPENAI_BASE_URL for an "
                "endpoint that is not OpenAI's"
            )
        if importlib.util.find_spec("openai") is None:
            raise MissingExtraError('chat models need the openai package: pip install "ipgo[openai]"')
        files.check_out(self.folder, folder=True, name="chat.cache")  # an answer is paid for

    def _request(self, messages: list[dict[str, str]]) -> str:
        """Ask the endpoint, again and again if need be."""
        from openai import OpenAI  # here, because it takes a second

        wait = FIRST_WAIT
        try:
            made = OpenAI(timeout=self.timeout, max_retries=0)
        except Exception as error:  # its HTTP library has errors of its own
            raise InputError(
                f"OPENAI_BASE_URL, or the address of a proxy, cannot be used: {first_line(error)}"
            ) from error
        with made as client:
            for attempt in range(self.retries + 1):
                answer, problem, asked = self._try(client, messages)
                if answer is not None:
                    return answer
                if attempt < self.retries:
                    time.sleep(min(wait if asked is None else asked, LONGEST_WAIT))
                    wait *= 2
            raise InputError(
                f"chat.model {self.model!r} at {client.base_url} gave no answer in {self.retries + 1} tries; "
                f"the last one ended in {problem}"
            )

    def _try(self, client: Any, messages: list[dict[str, str]]) -> tuple[str | None, str, float | None]:
        """An answer; or what went wrong, and for how many seconds the server wants to be left alone."""
        from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

        options = {} if self.temperature is None else {"temperature": self.temperature}
        try:
            reply = client.chat.completions.create(model=self.model, messages=messages, **options)
            answer = reply.choices[0].message.content
        except APITimeoutError:
            return None, f"a time-out after {self.timeout:g} s", None
        except APIConnectionError as error:
            return None, f"no connection ({error.__cause__ or error})", None
        except APIStatusError as error:
            if error.status_code not in PASSING and error.status_code < 500:
                reason = " ".join(str(error.message).split())
                raise InputError(
                    f"chat.model {self.model!r} at {client.base_url} was refused: {reason}"
                ) from error
            reason = " ".join(str(error.message).split())[:200]
            return (
                None,
                f"status {error.status_code} ({reason})",
                _seconds(error.response.headers.get("retry-after")),
            )
        except (APIError, ValueError, TypeError, LookupError, AttributeError):
            return None, "an answer that is not a chat completion", None
        if not isinstance(answer, str) or not answer.strip():
            return None, "an empty answer", None
        return _valid(answer), "", None


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; None if there is none, or a date, which the usual wait is good enough for."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None


def without_thoughts(answer: str) -> str:
    """An answer without what a model thought aloud, between <think> marks."""
    for pattern in THOUGHTS:
        answer = pattern.sub("", answer)
    return answer


def parse_texts(answer: str) -> list[str]:
    """The different texts that an answer lists: numbered, with bullets, as JSON, or one a line.

    Numbers, bullets, quotation marks, labels ("Prompt:") and fences are taken off. If some lines are numbered
    or have bullets, the others are talk; if none are, a line that ends with a colon is, and so is what a model thought
    aloud between <think> marks.
    """
    answer = without_thoughts(answer)
    lines = _json_texts(answer) or [line.strip() for line in answer.splitlines()]
    lines = [line for line in lines if line and not line.startswith("```")]
    items = [ITEM.sub("", line) for line in lines if ITEM.match(line)]
    found = items or [line for line in lines if not line.endswith(":")]
    texts = [_bare(text) for text in found]
    return [text for text in dict.fromkeys(texts) if text]


def parse_text(answer: str) -> str:
    """The text of an answer that was to be one text, on one line; empty if there is none.

    Lines and bullets are parts of it, numbered lines are several texts, of which the first is taken. Thoughts, fences,
    labels, quotation marks, and what announces it ("Sure! Here is your prompt:") are taken off.
    """
    answer = without_thoughts(answer)
    listed = _json_texts(answer)
    lines = listed[:1] or [line.strip() for line in answer.splitlines()]
    lines = [line for line in lines if line and not line.startswith("```")]
    several = [line for line in lines if NUMBERED.match(line)]
    whole = "\n".join(ITEM.sub("", line) for line in several[:1] or lines)
    text = _bare(ANNOUNCED.sub("", whole))
    return "" if text.endswith(":") else text  # it announces what did not come


def _json_texts(answer: str) -> list[str]:
    """Those of a list that begins a line or follows a colon, and ends one: a prompt may hold brackets too."""
    found = LIST.search(answer)
    try:
        values = json.loads(found[1]) if found else []
    except ValueError:
        return []
    return [value.strip() for value in values if isinstance(value, str)]


def _valid(text: str) -> str:
    """Without halves of surrogate pairs, which JSON allows and files do not, and without NUL."""
    return text.encode("utf-8", "ignore").decode().replace("\0", "")


def _bare(text: str) -> str:
    """On one line, without label, emphasis and quotation marks around it."""
    text = LABEL.sub("", " ".join(_valid(text).split()).strip("* ")).strip("* ")
    closing = QUOTES.get(text[:1])
    if closing is not None:
        inner = text.rstrip(",;")
        if len(inner) > 1 and inner.endswith(closing) and not {text[0], closing} & set(inner[1:-1]):
            return inner[1:-1].strip()
    return text
