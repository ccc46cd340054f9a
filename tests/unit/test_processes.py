"""A shared fit in two processes, as on two GPUs: real ones, joined by torch.distributed's gloo."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.insertion import Insertion
from ipgo.methods import IPGO
from ipgo.rewards import as_reward, load_reward
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests.conftest import tiny_pipeline

ROOT = Path(__file__).parents[2]
PROMPTS = ("a red cat", "a dog on the moon", "sun", "two boats")
STEPS = 3


def fitted(prompts, batch_size, troubled=None):
    """What a shared fit learns; `troubled` is the prompt whose gradient is not finite in the second step."""
    colorfulness = load_reward("colorfulness", device="cpu")
    calls = []

    def reward(images, texts):
        calls.append(texts)
        values = colorfulness(images, texts)
        bad = torch.tensor([float(text == troubled and len(calls) == 2) for text in texts])
        return values + (bad * (values - values.detach()).abs() + 1 - bad).sqrt()  # the root of zero

    method = IPGO(
        Insertion(num_prefix=2, num_suffix=2, rank=8),
        Ascent(steps=STEPS, lr=0.03, batch_size=batch_size, optimizer="sgd"),
    )
    task = Task(
        load_backend(tiny_pipeline(), device="cpu"),
        as_reward(reward, "reward"),
        prompts,
        Sampling(steps=2, guidance_scale=3.0),
        seeds=(),
        shared=True,
    )
    *_, last = method.fit(task)
    assert not last.failed.any()
    return {name: value.detach().contiguous() for name, value in last.adapter.named_parameters()}


def in_two_processes(folder, troubled=""):
    """What each of two processes holds that have half of the prompts each."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.test_processes", str(rank), str(folder), troubled],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [(worker.communicate(timeout=300)[1], worker.returncode) for worker in workers]
    assert [code for _, code in ends] == [0, 0], ends
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_two_processes_learn_what_one_learns_from_all_prompts(tmp_path):
    first, second = in_two_processes(tmp_path)
    alone = fitted(PROMPTS, len(PROMPTS))
    start = fitted(PROMPTS[:1], 1)
    assert first.keys() == second.keys() == alone.keys()
    assert any(not torch.allclose(start[name], value, atol=1e-4) for name, value in alone.items())
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-4)


def test_where_one_process_fails_a_step_both_go_back(tmp_path):
    first, second = in_two_processes(tmp_path, troubled=PROMPTS[1])
    calm = fitted(PROMPTS, len(PROMPTS))
    for name, value in first.items():
        assert value.isfinite().all()
        assert torch.equal(value, second[name])
    assert any(not torch.allclose(first[name], value, atol=1e-6) for name, value in calm.items())


def work(rank, folder, troubled):
    """One of the two processes."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        learned = fitted(PROMPTS[rank::2], 2, troubled or None)
    finally:
        distributed.destroy_process_group()
    save_file(learned, Path(folder) / f"{rank}.safetensors")


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
