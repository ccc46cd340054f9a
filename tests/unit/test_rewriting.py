"""The methods that rewrite prompts; chat models over loopback HTTP."""

import json

import pytest
import torch

from ipgo import chat as chat_module
from ipgo import cli
from ipgo.adapters import Adapter, TextAdapter, generate
from ipgo.adapters.text import from_bytes
from ipgo.backends import BACKENDS, load_backend
from ipgo.chat import Chat, parse_text, parse_texts
from ipgo.errors import InputError, MissingExtraError, ResumeError
from ipgo.methods import ChatGPT, LLMSearch, Promptist
from ipgo.rewards import FunctionReward, as_reward, load_reward, score
from ipgo.rewriting import Rewrites, ask_texts
from ipgo.sampling import Sampling
from ipgo.store import Run
from ipgo.task import Task
from tests.chat_endpoint import completion
from tests.conftest import assert_same_state

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=1, guidance_scale=3.0)
COLOUR = load_reward("colorfulness", device="cpu")


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, which are not waited."""
    slept = []
    monkeypatch.setattr(chat_module.time, "sleep", slept.append)
    return slept


def test_an_answer_is_asked_for_once(endpoint, monkeypatch, tmp_path):
    chat = Chat(model="tiny", temperature=0.5)
    assert chat.ask("be kind", "hello") == "a rewritten prompt"
    (request,) = endpoint.requests
    assert request["path"] == "/chat/completions"
    assert request["key"] == "Bearer secret"
    assert (request["model"], request["temperature"]) == ("tiny", 0.5)
    assert request["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]
    monkeypatch.delenv("OPENAI_API_KEY")
    chat.check("be kind", "hello")  # stored: no key is needed
    assert Chat(model="tiny", temperature=0.5, timeout=1, retries=0).ask("be kind", "hello")
    assert len(endpoint.requests) == 1
    for other in (
        lambda: chat.ask("be kind", "hello", index=1),
        lambda: chat.ask("be kind", "goodbye"),
        lambda: chat.check("be rude", "hello"),
        lambda: Chat(model="other", temperature=0.5).check("be kind", "hello"),
        lambda: Chat(model="tiny", temperature=0.4).check("be kind", "hello"),
        lambda: Chat(model="tiny", temperature=0.5, cache=str(tmp_path / "x")).check("be kind", "hello"),
    ):
        with pytest.raises(InputError, match="OPENAI_API_KEY is not set and no answer is stored"):
            other()
    with monkeypatch.context() as elsewhere:  # where another model may have that name
        elsewhere.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
        with pytest.raises(InputError, match="OPENAI_API_KEY is not set and no answer is stored"):
            chat.check("be kind", "hello")
    (file,) = (tmp_path / "cache" / "chat").iterdir()
    assert "secret" not in file.read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    file.write_text("{")
    assert chat.ask("be kind", "hello") == "a rewritten prompt"
    assert len(endpoint.requests) == 2
    assert json.loads(file.read_text())["answer"] == "a rewritten prompt"


def test_a_temperature_that_is_left_to_the_model_is_not_sent(endpoint):
    for temperature in (None, 0.0):
        Chat(model="tiny", temperature=temperature).ask("be kind", "hello")
    without, cold = endpoint.requests
    assert "temperature" not in without
    assert cold["temperature"] == 0.0


def test_passing_troubles_are_waited_out(endpoint, waits):
    endpoint.script = [
        (500, {}, b"{}", 0),
        (429, {"Retry-After": "7"}, b'{"error": {"message": "slow down"}}', 0),
        (200, {}, b'{"choices": [', 0),
        (200, {}, b'{"choices": []}', 0),
        (200, {"Content-Type": "text/html"}, b"<html>", 0),
        (200, {}, completion(" \n"), 0),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, b"", 0),
        (429, {"Retry-After": "900"}, b"{}", 0),
    ]
    endpoint.answer = lambda request: "at \ud83d last"
    assert Chat(retries=8).ask("", "hello") == "at  last"  # half a surrogate pair cannot be stored
    assert waits == [1, 7, 4, 8, 16, 32, 60, 60]
    assert len(endpoint.requests) == 9


def test_troubles_that_do_not_pass_are_said(endpoint, waits, monkeypatch):
    endpoint.script = [(401, {}, b'{"error": {"message": "wrong key"}}', 0)]
    with pytest.raises(InputError, match=r"chat\.model 'gpt-4o' at http://127.* was refused: .*401"):
        Chat().ask("", "hello")
    assert waits == []
    endpoint.script = [(500, {}, b"{}", 0)] * 3
    with pytest.raises(InputError, match="gave no answer in 3 tries; the last one ended in status 500"):
        Chat(retries=2).ask("", "hello")
    assert len(endpoint.requests) == 4
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="ended in no connection"):
        Chat(retries=0).ask("", "hello")
    monkeypatch.setattr(chat_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "ipgo\[openai\]"'):
        Chat().ask("", "hello")


def test_an_address_that_is_none_is_said_to_be(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:port/v1")
    with pytest.raises(InputError, match="OPENAI_BASE_URL, or the address of a proxy, cannot be used"):
        Chat().ask("", "sun")


def test_a_slow_answer_is_given_up(endpoint):
    endpoint.script = [(200, {}, completion("too late"), 0.6)]
    with pytest.raises(InputError, match=r"ended in a time-out after 0\.2 s"):
        Chat(timeout=0.2, retries=0).ask("", "hello")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": " "}, r"chat\.model is empty"),
        ({"temperature": -1.0}, r"chat\.temperature is -1"),
        ({"timeout": 0.0}, r"chat\.timeout is 0"),
        ({"retries": -1}, r"chat\.retries is -1"),
    ],
)
def test_wrong_settings_of_a_chat_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Chat(**options)


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("a cat", ["a cat"]),
        ('\n"A cat, 3d render."\n', ["A cat, 3d render."]),
        ("Here are two:\n\n1. a cat\n2) “a dog”\n\nHope this helps!", ["a cat", "a dog"]),
        ("- a cat\n* a dog\n• a cat", ["a cat", "a dog"]),
        ("(1) **a cat**\n**2.** `a dog`", ["a cat", "a dog"]),
        ("3d cat\n1.5 cats", ["3d cat", "1.5 cats"]),
        ('```json\n["a cat", "a [big] dog", 3]\n```', ["a cat", "a [big] dog"]),
        ("Sure:\nPrompt: a   cat\nRewritten prompt 2: a dog", ["a cat", "a dog"]),
        ("**Prompt 1:** a cat", ["a cat"]),
        ('"Tom" and "Jerry"\na cat that says "hi"', ['"Tom" and "Jerry"', 'a cat that says "hi"']),
        ("a [red] cat", ["a [red] cat"]),
        ('a sign that says ["OPEN"], at night', ['a sign that says ["OPEN"], at night']),
        ('Sure:\n["a cat",\n "a dog"]\nHope it helps.', ["a cat", "a dog"]),
        ("<think>\nA cat?\n</think>\n\na cat", ["a cat"]),
        ("<think>for ever", []),
        ("1. think\n2. answer\n</think>\n1. a cat\n2. a dog", ["a cat", "a dog"]),
        ('{"prompts": ["a cat", "a dog"]}', ["a cat", "a dog"]),
        ('```json\n{\n  "prompts": [\n    "a cat",\n    "a dog"\n  ]\n}\n```', ["a cat", "a dog"]),
        ('Here they are: ["a cat", "a dog"].', ["a cat", "a dog"]),
        ('1. "a cat",\n2. ""\n3.\n', ["a cat"]),
        ("Sure:\n```\n```", []),
        ("", []),
    ],
)
def test_answers_are_read_in_whatever_form_they_come(answer, texts):
    assert parse_texts(answer) == texts


# -- methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A red fox on a hill,\nsoft evening light", "A red fox on a hill, soft evening light"),
        ("A street scene:\n- neon signs\n* rain", "A street scene: neon signs rain"),
        ("Here is the rewritten prompt: A red fox", "A red fox"),
        ('Sure! Here\'s your prompt:\n\n```\n"A fox, at dawn"\n```', "A fox, at dawn"),
        ("**Rewritten prompt:** A red fox", "A red fox"),
        ("Here is a fox on a hill", "Here is a fox on a hill"),
        ("1. A fox\n2. A cat", "A fox"),
        ("2 foxes on a hill", "2 foxes on a hill"),
        ('["a fox"]', "a fox"),
        ("<think>a fox?</think>a cat", "a cat"),
        ("<think>a fox?", ""),
        ("The user wants a fox.\nFine.\n</think>\n\nA red fox", "A red fox"),
        ("This is a photo of a fox, style: watercolor", "This is a photo of a fox, style: watercolor"),
        ("Here is a fox: red on blue", "Here is a fox: red on blue"),
        ("Here's the better one:\nA red fox", "A red fox"),
        ("Here you go: A red fox", "A red fox"),
    ],
)
def test_an_answer_that_is_one_text_is_read_whole(answer, text):
    assert parse_text(answer) == text


def test_chatgpt_takes_a_single_answer_as_it_is(backend, endpoint):
    endpoint.answer = lambda request: f"Prompt: {request['messages'][1]['content']}, at dawn"
    worse = FunctionReward(lambda images, prompts: -images.mean((1, 2, 3)), "darkness", differentiable=False)
    (step,) = ChatGPT().fit(Task(backend, worse, PROMPTS, SAMPLING, seeds=(3, 4)))
    assert step.adapter.texts == ("a red cat, at dawn", "sun, at dawn")
    drawn = [generate(backend, step.adapter.texts, [seed] * 2, Adapter(), SAMPLING) for seed in (3, 4)]
    expected = torch.stack([worse(images, PROMPTS) for images in drawn]).mean(0)
    torch.testing.assert_close(step.rewards, expected)
    instruction = endpoint.requests[0]["messages"][0]["content"]
    assert "how well it shows what the prompt says" in instruction
    assert "60 words" in instruction
    list(ChatGPT().fit(Task(backend, worse, PROMPTS, SAMPLING)))  # again: nothing is asked
    assert len(endpoint.requests) == 2


def test_chatgpt_keeps_the_best_of_several(backend, endpoint, caplog):
    long = "abcdefg " * 12
    endpoint.answer = lambda request: f"1. a dog\n2. {long}\n3. a blue house\n4. never asked for"
    task = Task(backend, COLOUR, PROMPTS, SAMPLING)
    method = ChatGPT(n=3)
    steps = list(method.fit(task))
    texts = ["a dog", ("abcdefg " * 10).strip(), "a blue house"]
    values = torch.stack(
        [COLOUR(generate(backend, [text] * 2, [0, 0], Adapter(), SAMPLING), PROMPTS) for text in texts]
    )
    torch.testing.assert_close(torch.stack([step.rewards for step in steps]), values)
    assert steps[-1].adapter.texts == tuple(texts[place] for place in values.argmax(0).tolist())
    assert "is too long for the encoder; it is cut to 'abcdefg" in caplog.text
    states = [step.state() for step in method.fit(task)]
    resumed = list(method.fit(task, resume=states[0]))
    assert_same_state(states[-1], resumed[-1].state())
    assert len(endpoint.requests) == 2
    with pytest.raises(ResumeError, match="other settings"):
        list(ChatGPT(n=2).fit(task, resume=states[0]))
    with pytest.raises(InputError, match="shared is true"):
        method.fit(Task(backend, COLOUR, PROMPTS, SAMPLING, shared=True))
    with pytest.raises(InputError, match="n is 0"):
        ChatGPT(n=0)


def test_answers_without_a_text_are_asked_for_anew(backend, endpoint, caplog):
    answers = iter(["Sorry:", "```\n```", "1. a dog\n2. a dog"])
    endpoint.answer = lambda request: next(answers)
    assert ask_texts(Chat(), backend, "", "sun", 3) == ["a dog"] * 3
    assert "gave 1 texts instead of 3" in caplog.text
    assert len(endpoint.requests) == 3
    endpoint.answer = lambda request: "Sorry:"
    with pytest.raises(InputError, match="gave no text for 'moon' in 3 answers"):
        ask_texts(Chat(), backend, "", "moon", 1)
    endpoint.answer = lambda request: "a dog"
    assert ask_texts(Chat(), backend, "", "moon", 1) == ["a dog"]  # the useless ones were not kept


def test_each_reward_has_its_instruction():
    said = {
        name: ChatGPT().instruction(name) for name in ("emoji-clip", "clip", "aesthetic", "mine.py:warmth")
    }
    assert said["emoji-clip"] == said["clip"]
    assert len(set(said.values())) == 3
    both = ChatGPT(n=4).instruction("emoji-clip+0.5*emoji-aesthetic")
    assert "faithfully" in both
    assert "beautiful" in both
    assert "Answer with 4 different rewritten prompts" in both
    for spec in ("hpsv2.1", "pickscore:a/folder", "imagereward"):
        assert ChatGPT().instruction(spec) == ChatGPT().instruction("emoji-preference"), spec
    assert ChatGPT().instruction("clip@notebook") == said["clip"]
    assert ChatGPT().instruction("a*b") == ChatGPT().instruction("mine")  # a function's own name
    assert "as a fault, how vivid" in ChatGPT().instruction("emoji-clip+-0.5*colorfulness")


def test_how_long_a_text_may_be_is_said():
    assert "at most 17 words" in ChatGPT(max_words=17).instruction("clip")
    assert "at most 17 words" in LLMSearch(max_words=17)._instruction()


def test_llm_search_learns_from_its_history(backend, endpoint):
    def answer(request):
        instruction, question = (message["content"] for message in request["messages"])
        if "You study trials" in instruction:
            return "<think>Cats? No.</think>Dogs score high."
        number = question.count("\n0.") + question.count("\n-0.")
        return f"1. a dog {number}\n2. a cat {number}"

    endpoint.answer = answer
    task = Task(backend, COLOUR, ("sun",), SAMPLING)
    method = LLMSearch(rounds=2, n=2, shown=2)
    steps = list(method.fit(task))
    assert len(steps) == 5
    raw = COLOUR(generate(backend, ["sun"], [0], Adapter(), SAMPLING), ["sun"])
    assert steps[0].rewards.item() == pytest.approx(raw.item())
    asked = [[message["content"] for message in request["messages"]] for request in endpoint.requests]
    assert asked[0][1] == "The user's prompt: sun"
    rewards = {
        text: float(step.rewards) for text, step in zip(("sun", "a dog 0", "a cat 0"), steps, strict=False)
    }
    best = sorted(rewards, key=lambda text: rewards[text])[1:]
    trials = "\n".join(["The user's prompt: sun", "", "Trials, the best one last:"]
                       + [f"{rewards[text]:.4g}: {text}" for text in best])  # fmt: skip
    assert asked[1][1] == trials
    assert asked[2][1] == f"{trials}\n\nHint: Dogs score high."
    assert "Answer with 2 new prompts" in asked[2][0]
    assert float(steps[-1].best) == max(float(step.rewards) for step in steps)
    # Stopped in the middle of a round and continued: the same bits, and nothing is asked again.
    states = [step.state() for step in method.fit(task)]
    resumed = list(method.fit(task, resume=states[1]))
    assert_same_state(states[-1], resumed[-1].state())
    assert len(endpoint.requests) == 3
    with pytest.raises(InputError, match="shared is true"):
        method.fit(Task(backend, COLOUR, PROMPTS, SAMPLING, shared=True))
    with pytest.raises(InputError, match="rounds is 0"):
        LLMSearch(rounds=0)


def test_llm_search_asks_anew_when_a_round_changed_nothing(backend, endpoint):
    """The question is that of the round before where no new text is among the best."""
    endpoint.answer = lambda request: f"1. a dog {len(endpoint.requests)}\n2. a cat {len(endpoint.requests)}"
    falling = iter(range(9, 0, -1))
    reward = as_reward(
        lambda images, prompts: torch.tensor([float(next(falling))]), "falling", differentiable=False
    )
    task = Task(backend, reward, ("sun",), SAMPLING)
    *_, last = LLMSearch(rounds=4, n=2, shown=1, hints=False).fit(task)
    assert len(set(from_bytes(last.state()["proposer.texts"][:, 0]))) == 9


def test_history_leaves_out_what_was_not_finite():
    table = Rewrites(("sun",), 3, lambda table, step: [[""], ["a dog"], ["a cat"]])
    adapter = TextAdapter(("sun",))
    for step, reward in enumerate((0.5, torch.nan, 0.25)):
        table.propose(adapter, step)
        table.tell(step, torch.tensor([reward]))
    assert table.history(0, 3) == [("sun", 0.5), ("a cat", 0.25)]
    assert table.history(0, 1) == [("sun", 0.5)]


def test_the_history_is_that_of_the_prompt():
    table = Rewrites(PROMPTS, 1, lambda table, step: [["a dog", "a cat"]])
    adapter = TextAdapter(PROMPTS)
    table.propose(adapter, 0)
    table.tell(0, torch.tensor([0.5, 0.25]))
    assert [table.history(row, 1) for row in (0, 1)] == [[("a dog", 0.5)], [("a cat", 0.25)]]


def test_nothing_is_asked_where_an_answer_could_not_be_stored(endpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"chat\.cache is '.*file/chat', which cannot be written: Not a directory"
    ):
        Chat(cache=str(tmp_path / "file/chat")).ask("rewrite", "a fox")
    assert not endpoint.requests


@pytest.mark.parametrize("name", ["chatgpt", "llm-search"])
def test_from_the_command_line_without_and_with_a_key(
    name, endpoint, pipeline_folder, tmp_path, monkeypatch, capsys
):
    endpoint.answer = lambda request: "1. a dog\n2. a cat"
    command = ["fit", *PROMPTS, "--method", name, "--method.n", "2", "--backend", pipeline_folder]
    flags = "--reward colorfulness --held-out contrast --unseen-seeds 1 --sampling.steps 1"
    command += flags.split()
    if name == "llm-search":
        command += ["--method.rounds", "1"]
    out = ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.delenv("OPENAI_API_KEY")
        patch.setattr("ipgo.models.load_backend", None)  # not even looked at
        assert cli.main([*command, *out]) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main([*command, *out]) == 0
    run = Run.open(tmp_path / "run")
    assert [result["status"] for result in run.results()] == ["finished"] * 2
    assert all(run.load_adapter(prompt).texts[0] in ("", "a dog", "a cat") for prompt in run.prompts)
    asked = len(endpoint.requests)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert cli.main([*command, "--out", str(tmp_path / "again")]) == 0
    assert len(endpoint.requests) == asked == 2


# -- Promptist ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["a red cat", "  sun, 3D \n", "rephrase: rephrase:", "☀ “sun”  sun Rephrase:"]
)
def test_promptist_takes_the_first_beam(rewriter, backend, pipe, prompt):
    folder, model = rewriter
    method = Promptist(model=str(folder), max_new_tokens=12)
    (step,) = method.fit(Task(backend, COLOUR, (prompt,), SAMPLING))
    tokens = pipe.tokenizer(
        prompt.strip() + " Rephrase:", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    beams = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=12,
        num_beams=8,
        num_return_sequences=8,
        eos_token_id=pipe.tokenizer.eos_token_id,
        pad_token_id=pipe.tokenizer.eos_token_id,
        length_penalty=-1.0,
    )
    texts = [pipe.tokenizer.decode(beam[tokens.shape[1] :], skip_special_tokens=True) for beam in beams]
    assert len(set(texts)) > 1
    assert texts[0].strip()
    assert step.adapter.texts == (" ".join(texts[0].split()),)
    images = generate(backend, step.adapter.texts, [0], Adapter(), SAMPLING)
    torch.testing.assert_close(step.rewards, score(COLOUR, images, [prompt]))


def test_promptists_beams_and_length_are_those_that_are_asked_for(rewriter, backend, monkeypatch):
    folder, model = rewriter
    seen, kind = [], type(model)
    write = kind.generate
    monkeypatch.setattr(
        kind, "generate", lambda *given, **named: seen.append(named) or write(*given, **named)
    )
    method = Promptist(model=str(folder), beams=3, max_new_tokens=5, length_penalty=0.5)
    list(method.fit(Task(backend, COLOUR, ("sun",), SAMPLING)))
    asked = [(each["num_beams"], each["max_new_tokens"], each["length_penalty"]) for each in seen]
    assert asked == [(3, 5, 0.5)]


def test_promptist_says_what_it_lacks(rewriter, pipe, backend, tmp_path, monkeypatch, caplog):
    assert Promptist()._places("sd15") == ("microsoft/Promptist", "gpt2")
    assert Promptist(model="x/y")._places("emoji") == ("x/y", "x/y")
    assert (
        Promptist()._places("emoji")
        == Promptist()._places(BACKENDS["emoji"][1])
        != ("microsoft/Promptist", "gpt2")
    )
    with pytest.raises(InputError, match=r"method\.model .* cannot be opened"):
        list(Promptist(model=str(tmp_path)).fit(Task(backend, COLOUR, ("sun",), SAMPLING)))
    with pytest.raises(InputError, match="beams is 0"):
        Promptist(beams=0)
    room = rewriter[1].config.n_positions
    cut = load_backend(pipe, device="cpu", long_prompts="truncate")
    with pytest.raises(
        InputError, match=f"reads and writes {room} in all; shorten it, or lower max_new_tokens"
    ):
        list(Promptist(model=str(rewriter[0])).fit(Task(cut, COLOUR, ("sun " * room,), SAMPLING)))
    monkeypatch.setattr(Promptist, "rewrite", lambda self, model, tokenizer, prompt: "")
    (step,) = Promptist(model=str(rewriter[0])).fit(Task(backend, COLOUR, ("sun",), SAMPLING))
    assert step.adapter.texts == ("",)
    assert "writes nothing for 'sun', which is drawn as it is" in caplog.text
