"""Errors, seeds, embeddings and images."""

import pytest
import torch

from ipgo.devices import choose_device, choose_dtype
from ipgo.embeds import SINK, PromptEmbeds, concatenate
from ipgo.errors import InputError, unknown
from ipgo.images import center_crop, normalise, resize, to_pil
from ipgo.sampling import Sampling
from ipgo.seeding import derive, shuffled


def test_an_unknown_name_gets_the_nearest_spelling():
    assert str(unknown("reward", "asthetic", ["aesthetic", "clip"])) == (
        "unknown reward 'asthetic'; did you mean 'aesthetic'?"
    )
    assert str(unknown("reward", "xyz", ["clip", "aesthetic"])) == (
        "unknown reward 'xyz'; choose from aesthetic, clip"
    )


def test_derived_seeds_never_change():
    assert derive(0) == 7210762507766007076
    assert derive(0, "a red cat", 3) == 1578788654073231487
    assert derive(0, "a", 1) != derive(0, "a1") != derive(1, "a", 1)
    assert all(0 <= derive(seed) < 2**63 for seed in range(200))


def test_each_pass_and_each_seed_has_an_order_of_its_own():
    first, second, other = shuffled(9, 0, 9, 0), shuffled(9, 9, 9, 0), shuffled(9, 0, 9, 1)
    assert all(sorted(each.tolist()) == list(range(9)) for each in (first, second, other))
    assert len({tuple(each.tolist()) for each in (first, second, other)}) == 3
    torch.testing.assert_close(shuffled(9, 5, 9, 0), torch.cat([first, second])[5:14])


def test_devices_and_formats():
    cpu = choose_device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == choose_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert choose_device(cpu) == cpu
    with pytest.raises(InputError, match="unknown dtype 'float23'; did you mean 'float32'"):
        choose_dtype("float23", cpu)
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        choose_dtype(torch.int8, cpu)
    with pytest.raises(InputError, match="unknown device 7"):
        choose_device(7.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        choose_device("gpu")
    with pytest.raises(InputError, match="cuda:99"):
        choose_device("cuda:99")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_the_format_of_a_gpu_is_one_that_it_computes_with(capability, expected, monkeypatch):
    """Of the GPU that is asked for: those of a machine may differ."""
    capabilities = {0: (6, 0), 1: capability}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capabilities[device.index])
    assert choose_dtype("auto", torch.device("cuda:1")) == expected
    assert choose_dtype("float32", torch.device("cuda:1")) == torch.float32


def test_inserting_embeddings():
    states = torch.arange(12.0).view(1, 3, 4)
    prompt = PromptEmbeds(states, torch.tensor([[True, True, False]]))
    prefix, suffix = torch.full((1, 1, 4), -1.0), torch.full((1, 2, 4), -2.0)
    longer = prompt.insert(prefix, suffix)
    assert longer.embeds.tolist() == torch.cat([prefix, states, suffix], 1).tolist()
    assert longer.mask.tolist() == [[True, True, True, False, True, True]]
    assert prompt.mean().tolist() == [[2.0, 3.0, 4.0, 5.0]]  # the padding does not count
    assert prompt.norm().item() == pytest.approx(14**0.5)  # the median, of two the smaller
    assert prompt.select(torch.tensor([0, 0])).embeds.shape == (2, 3, 4)


def test_a_pooled_vector_goes_where_its_prompt_goes():
    text = torch.ones(2, 3, dtype=torch.bool)
    early = PromptEmbeds(torch.ones(2, 3, 4), text, torch.zeros(2, 5))
    pooled = torch.arange(10.0).view(2, 5)
    prompt = PromptEmbeds(torch.zeros(2, 3, 4), text, pooled, early, 0.5)
    longer = prompt.insert(torch.ones(2, 1, 4), torch.ones(2, 0, 4))
    assert torch.equal(longer.pooled, pooled)
    assert torch.equal(longer.at(0, 4).pooled, early.pooled)
    assert torch.equal(longer.at(2, 4).pooled, pooled)
    assert prompt.select(torch.tensor([1])).pooled.tolist() == [[5, 6, 7, 8, 9]]
    both = concatenate([prompt, longer])
    assert both.embeds.shape == (4, 4, 4)
    assert both.mask.sum(1).tolist() == [3, 3, 4, 4]
    assert torch.equal(both.pooled, torch.cat([pooled, pooled]))


def test_inserted_embeddings_take_the_format_of_the_prompt():
    prompt = PromptEmbeds(torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bool))
    longer = prompt.insert(torch.ones(2, 1, 4), torch.ones(2, 0, 4))
    assert longer.embeds.dtype == torch.bfloat16
    assert longer.mean().dtype == torch.float32


def test_resize_crop_and_normalise():
    images = torch.rand(2, 3, 20, 30, requires_grad=True)
    small = resize(images, 10)
    assert small.shape == (2, 3, 10, 15)
    assert center_crop(small, 10).shape == (2, 3, 10, 10)
    assert resize(images, 20) is images
    small.sum().backward()
    assert images.grad is not None
    ones = normalise(torch.ones(1, 3, 2, 2), (0.5, 0.0, 1.0), (0.5, 2.0, 1.0))
    assert ones[0, :, 0, 0].tolist() == [1.0, 0.5, 0.0]


def test_pictures():
    images = torch.zeros(3, 3, 4, 6)
    images[1, 0] = 1.0
    pictures = to_pil(images)
    assert [picture.size for picture in pictures] == [(6, 4)] * 3
    assert pictures[1].getpixel((0, 0)) == (255, 0, 0)


def test_a_fit_may_draw_in_fewer_steps():
    sampling = Sampling(steps=20, guidance_scale=3, fit_steps=8)
    assert sampling.fitting == Sampling(steps=8, guidance_scale=3, fit_steps=None)
    assert Sampling(steps=20, fit_steps=None).fitting == Sampling(steps=20, fit_steps=None)
    assert Sampling(steps=4, fit_steps=8).fitting.steps == 4
    assert Sampling(steps=20, eta=1, fit_steps=8).fitting.steps == 20
    with pytest.raises(InputError, match="fit_steps is 0; it must be at least 1"):
        Sampling(fit_steps=0)


def test_a_sink_is_a_state_of_many_times_the_usual_norm() -> None:
    """Text alone counts, and what is just as long as allowed is none."""
    lengths = torch.tensor([1.0, 0.99 * SINK, 1.01 * SINK, 1.0])
    states = torch.zeros(1, 4, 3)
    states[0, :, 0] = 2 * lengths
    prompt = PromptEmbeds(states, torch.tensor([[True, True, True, False]]))
    assert prompt.words(torch.tensor([2.0])).tolist() == [[True, True, False, False]]
