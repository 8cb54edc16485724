"""Small steps of bfloat16 weights count, and a saved state goes on bit for bit."""

import copy

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from vltrain.training import bf16_adamw
from vltrain.training.bf16_adamw import Bf16AdamW, join, round_at_random, split

SIZE = 64 * 80  # more than the 4096 weights from which on moments have 8 bits


def parameter(dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter((torch.randn(64, 80) * 0.02).to(dtype))


def steps(weight: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Gradients of all kinds, the same for every optimizer."""
    torch.manual_seed(1)
    for _ in range(count):
        weight.grad = (torch.randn(64, 80) + 0.5).to(weight.dtype)
        state = torch.get_rng_state()
        optimizer.step()
        torch.set_rng_state(state)


def moved(weight: Tensor) -> Tensor:
    return weight.detach().float() - parameter().float()


def test_a_float32_is_the_nearest_bfloat16_and_a_residual_bit_for_bit():
    wide = torch.randn(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,))
    wide = torch.cat([wide, torch.tensor([0.0, -0.0, 1.0, 2.0**-140, 3.0e38, torch.inf])])

    weight, residual = split(wide)

    assert torch.equal(join(weight, residual).view(torch.int32), wide.view(torch.int32))
    nearest = wide.bfloat16()
    ties = wide.view(torch.int32) & 0xFFFF == 1 << 15  # these may go either way
    assert torch.equal(weight[~ties], nearest[~ties])


def test_a_weight_that_is_not_a_number_stays_none():
    wide = torch.tensor([torch.nan, -torch.nan])

    assert split(wide)[0].isnan().all()


def test_rounding_at_random_is_right_on_average_and_never_off_by_more_than_one_place():
    torch.manual_seed(0)
    # of bfloat16's neighbours 1 and 1 + 2 ** -7, this lies a quarter of the way
    wide = torch.full((100_000,), 1 + 2**-9)

    rounded = round_at_random(wide).float()

    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_what_is_a_bfloat16_already_is_not_rounded_at_all():
    weights = parameter().detach().view(-1)

    assert torch.equal(round_at_random(weights.float()), weights)


@pytest.mark.parametrize(("rounding", "exact"), [("residual", True), ("stochastic", False)])
def test_a_hundred_steps_of_1e_5_move_a_weight_by_1e_3(rounding, exact):
    weight = parameter()
    optimizer = Bf16AdamW([weight], rounding=rounding, lr=1e-5, weight_decay=0.0)

    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    change = moved(weight)
    assert change.mean().item() == pytest.approx(-1e-3, rel=0.03)
    if exact:
        master = join(weight.detach().view(-1), optimizer.state[weight]["residual"].view(-1))
        change = master.view(64, 80) - parameter().float()
        torch.testing.assert_close(change, torch.full_like(change, -1e-3), rtol=0.01, atol=1e-8)


def test_without_either_they_move_most_weights_not_at_all():
    weight = parameter()
    optimizer = AdamW8bit([weight], lr=1e-5, weight_decay=0.0)

    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    assert (moved(weight) == 0).float().mean() > 0.75


@pytest.mark.parametrize("chunk", [bf16_adamw.CHUNK, 256 * 3])  # the latter leaves a short one
def test_with_residuals_the_weights_are_those_that_float32_would_have(monkeypatch, chunk):
    monkeypatch.setattr(bf16_adamw, "CHUNK", chunk)
    weight, wide = parameter(), nn.Parameter(parameter().detach().float())
    optimizer = Bf16AdamW([weight], rounding="residual", lr=1e-5, weight_decay=0.1)
    steps(weight, optimizer, 30)
    settings = {"lr": 1e-5, "weight_decay": 0.1}
    other = AdamW8bit([wide], **settings)
    torch.manual_seed(1)
    for _ in range(30):
        wide.grad = (torch.randn(64, 80) + 0.5).bfloat16().float()
        other.step()

    master = join(weight.detach().view(-1), optimizer.state[weight]["residual"].view(-1))

    assert torch.equal(master.view(64, 80), wide)


def test_a_small_weight_has_moments_of_32_bits_and_the_steps_of_torchs_adamw():
    weight = nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.full((4,), 0.5))
    settings = {"lr": 1e-5, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer = Bf16AdamW([weight], rounding="residual", **settings)
    other = torch.optim.AdamW([wide], **settings)

    for number in range(20):
        for one, of in ((weight, optimizer), (wide, other)):
            one.grad = torch.full_like(one, 1.0 + number)
            of.step()

    state = optimizer.state[weight]
    assert state["state1"].dtype == torch.float32
    torch.testing.assert_close(join(weight.detach(), state["residual"]), wide.detach())


def test_a_weight_in_float32_is_stepped_as_bitsandbytes_does():
    ours, theirs = parameter(torch.float32), parameter(torch.float32)

    steps(ours, Bf16AdamW([ours], rounding="stochastic", lr=1e-3), 5)
    steps(theirs, AdamW8bit([theirs], lr=1e-3), 5)

    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
def test_a_saved_state_goes_on_bit_for_bit(rounding, tmp_path):
    whole, cut = parameter(), parameter()
    first = Bf16AdamW([whole], rounding=rounding, lr=1e-4)
    second = Bf16AdamW([cut], rounding=rounding, lr=1e-4)
    steps(whole, first, 7)
    steps(cut, second, 7)
    torch.save((second.state_dict(), torch.get_rng_state()), tmp_path / "state.pt")
    again = nn.Parameter(copy.deepcopy(cut.data))
    third = Bf16AdamW([again], rounding=rounding, lr=1e-4)

    state, _ = torch.load(tmp_path / "state.pt")
    third.load_state_dict(state)
    steps(whole, first, 7)
    steps(again, third, 7)

    assert torch.equal(whole, again)
    for key, value in first.state[whole].items():
        other = third.state[again][key]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_a_state_of_the_other_rounding_is_refused():
    weight = parameter()
    optimizer = Bf16AdamW([weight], rounding="stochastic")
    steps(weight, optimizer, 1)

    with pytest.raises(ValueError, match="not one of residual rounding"):
        Bf16AdamW([weight], rounding="residual").load_state_dict(optimizer.state_dict())
