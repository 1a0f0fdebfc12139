"""The training loop: a killed run goes on to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decompclip.training.loop import Recipe, StackedMuon, build_optimizers, in_words, train


class Tower(nn.Module):
    """A linear map under the name that open_clip's blocks have."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Parameter(torch.zeros(3, 4))
        self.stem = nn.Linear(4, 4)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([nn.Linear(4, 4)])

    @property
    def only_block(self) -> nn.Linear:
        block = self.get_submodule("transformer.resblocks.0")
        assert isinstance(block, nn.Linear)
        return block

    def forward(self, x: Tensor) -> Tensor:
        return self.only_block(torch.relu(self.stem(x))) + self.token_embedding.sum(0)


def tower() -> Tower:
    model = Tower()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def loss_of(model: Tower):
    def loss(step: int) -> Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x).square().mean()

    return loss


RECIPE = Recipe(samples=320, batch_size=8, optimizer="muon", lr=0.02)


def quiet(_: str) -> None: ...


def test_the_loss_falls() -> None:
    model = tower()
    history = train({"m": model}, loss_of(model), RECIPE, evaluate_every=10, log=quiet)
    assert [entry["step"] for entry in history] == [10, 20, 30, 40]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = tower()
    train({"m": whole}, loss_of(whole), RECIPE, log=quiet)

    class Killed(Exception): ...

    broken = tower()
    plain = loss_of(broken)

    def until_25(step: int) -> Tensor:
        if step == 25:
            raise Killed
        return plain(step)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Killed):
        train({"m": broken}, until_25, RECIPE, checkpoint=checkpoint, checkpoint_every=10, log=quiet)
    resumed = tower()
    seen: list[int] = []

    def counted(step: int) -> Tensor:
        seen.append(step)
        return loss_of(resumed)(step)

    train({"m": resumed}, counted, RECIPE, checkpoint=checkpoint, checkpoint_every=10, log=quiet)
    assert seen[0] == 20
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.partial"))


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    model = tower()
    train({"m": model}, loss_of(model), RECIPE, checkpoint=tmp_path / "run.pt", log=quiet)
    other = Recipe(samples=320, batch_size=8, lr=0.1)
    with pytest.raises(ValueError, match="written by another recipe; delete it to start anew"):
        train({"m": model}, loss_of(model), other, checkpoint=tmp_path / "run.pt", log=quiet)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = tower()
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; lower the learning rate"):
        train({"m": model}, lambda step: loss_of(model)(step) * float("nan"), RECIPE, log=quiet)


def test_who_is_optimised_how() -> None:
    model = tower()
    (adamw, adamw_lr), (muon, muon_lr) = build_optimizers(
        [model], Recipe(8, lr=0.5, adamw_ratio=0.1, optimizer="muon")
    )
    assert (adamw_lr, muon_lr) == (0.05, 0.5)
    decayed, plain = (group["params"] for group in adamw.param_groups)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model.only_block.weight)]
    assert [id(p) for p in decayed] == [id(model.stem.weight)]
    assert {id(p) for p in plain} == {
        id(p) for p in (model.token_embedding, model.stem.bias, model.only_block.bias)
    }
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


def test_a_run_can_stop_within_its_schedule_and_go_on(tmp_path: Path) -> None:
    whole, cut = tower(), tower()
    history = train({"m": whole}, loss_of(whole), RECIPE, evaluate_every=10, log=quiet)
    options = {"checkpoint": tmp_path / "run.pt", "evaluate_every": 10, "log": quiet}
    assert train({"m": cut}, loss_of(cut), RECIPE, stop=17, **options)[-1]["step"] == 17
    resumed = tower()
    train({"m": resumed}, loss_of(resumed), RECIPE, stop=17, **options)  # nothing left to do
    assert torch.equal(resumed.stem.weight, cut.stem.weight)
    train({"m": resumed}, loss_of(resumed), RECIPE, **options)
    assert torch.equal(resumed.stem.weight, whole.stem.weight)
    assert history[-1]["lr"] < history[0]["lr"]


def test_the_loss_of_an_entry_is_the_mean_since_the_one_before() -> None:
    model, seen = tower(), []

    def noted(step: int) -> Tensor:
        value = loss_of(model)(step)
        seen.append(value.item())
        return value

    history = train({"m": model}, noted, RECIPE, evaluate_every=15, log=quiet)
    means = [sum(seen[a:b]) / (b - a) for a, b in ((0, 15), (15, 30), (30, 40))]
    assert [entry["loss"] for entry in history] == pytest.approx(means, abs=1e-4)


def test_an_entry_of_the_history_is_a_line() -> None:
    first = {"step": 10, "samples": 320, "loss": 1.25, "lr": 0.0003, "seconds": 4.0}
    second = {
        "step": 20,
        "samples": 640,
        "loss": 0.5,
        "lr": 0.0,
        "cacc": 0.987,
        "asr": 0.5,
        "scale": 14.2,
        "seconds": 6.0,
    }
    assert in_words(first) == "step 10, loss 1.2500, rate 0.0003, 80 images/s"
    assert (
        in_words(second, first)
        == "step 20, loss 0.5000, rate 0, CACC 98.7 %, ASR 50.0 %, scale 14.2, 160 images/s"
    )
    assert "images/s" not in in_words({**first, "seconds": 0.0})


def test_a_process_that_is_not_the_main_one_neither_logs_nor_writes(tmp_path: Path) -> None:
    model, told = tower(), []
    history = train(
        {"m": model}, loss_of(model), RECIPE, checkpoint=tmp_path / "a.pt", log=told.append, main=False
    )
    assert (history, told, list(tmp_path.iterdir())) == ([], [], [])


def test_progress_is_told_after_each_step() -> None:
    model, told = tower(), []
    train({"m": model}, loss_of(model), RECIPE, log=quiet, progress=lambda done, _: told.append(done))
    assert told == list(range(1, 41))


def test_another_run_s_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tower()
    train({"m": model}, loss_of(model), RECIPE, checkpoint=tmp_path / "a.pt", log=quiet, identity="x")
    with pytest.raises(ValueError, match="another model or other pairs; delete it to start anew"):
        train({"m": model}, loss_of(model), RECIPE, checkpoint=tmp_path / "a.pt", log=quiet, identity="y")


def test_stacked_muon_is_torch_s() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(12, 8), (8, 12), (12, 8), (8, 8)]
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = StackedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=g)
            other.grad = mine.grad.clone()
        if step == 1:
            ours[0].grad = theirs[0].grad = None  # a parameter that this step does not reach
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=0.02)  # products in bf16
        assert mine.abs().max() > 0.05
