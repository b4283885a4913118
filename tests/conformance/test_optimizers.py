"""Optimizers and schedulers: steps train exactly once, without weight decay, and no schedule is disturbed."""

import copy
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, loader, quiet
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from lightning_qinit import QuantInitCallback
from lightning_qinit.insertion import named_quantizers, quantized_layers


def learned(module: nn.Module) -> dict[str, Tensor]:
    """Steps and offsets by name."""
    quantizers = named_quantizers(quantized_layers(module))
    return {f"{name}.{key}": p for name, q in quantizers.items() for key, p in q.named_parameters()}


def check_each_once(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    assert all(held[id(p)] == 1 for p in learned(module).values())
    assert set(held.values()) == {1}


def with_optimizer(configure: Callable[[pl.LightningModule], Any]) -> pl.LightningModule:
    class Configured(SmallNet):
        def configure_optimizers(self) -> Any:
            return configure(self)

    model = Configured()
    model.dropout.p = 0.0
    return model


def test_steps_have_no_weight_decay(make_trainer) -> None:
    model = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.5))
    trainer = make_trainer(quiet(activation_quantizer="lsq+"), max_steps=1)
    trainer.fit(model, loader())
    check_each_once(model, trainer.optimizers)
    for group in trainer.optimizers[0].param_groups:
        steps = [id(p) for p in group["params"] if any(p is q for q in learned(model).values())]
        assert len(steps) in (0, len(group["params"]))
        assert group["weight_decay"] == (0.0 if steps else 0.5) and group["lr"] == 0.1


def test_without_weight_decay_the_groups_stay_as_they_are(make_trainer) -> None:
    model = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), 0.1))
    trainer = make_trainer(quiet(), max_steps=1)
    trainer.fit(model, loader())
    assert len(trainer.optimizers[0].param_groups) == 1
    check_each_once(model, trainer.optimizers)


def test_groups_of_the_user_keep_their_settings(make_trainer) -> None:
    def configure(m: pl.LightningModule) -> torch.optim.Optimizer:
        steps = set(learned(m).values())
        rest = [p for p in m.parameters() if p not in steps]
        groups = [{"params": rest[:3], "lr": 0.1}, {"params": rest[3:], "weight_decay": 0.0}]
        return torch.optim.AdamW([*groups, {"params": list(steps), "lr": 0.003}], 0.01, weight_decay=0.2)

    model = with_optimizer(configure)
    trainer = make_trainer(quiet(), max_steps=1)
    trainer.fit(model, loader())
    groups = trainer.optimizers[0].param_groups
    # the third is the user's own choice for steps, decay included
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.2), (0.01, 0.0), (0.003, 0.2)]


def test_names_of_groups_and_of_parameters_stay_apart(make_trainer, tmp_path) -> None:
    def grouped(m: pl.LightningModule) -> torch.optim.Optimizer:
        body = [*m.stem.parameters(), *m.body.parameters()]
        rest = [p for p in m.parameters() if not any(p is q for q in body)]
        return torch.optim.AdamW([{"params": body, "name": "body"}, {"params": rest, "name": "rest"}], weight_decay=0.1)

    trainer = make_trainer(quiet(), LearningRateMonitor(), max_steps=1, logger=CSVLogger(tmp_path))
    trainer.fit(with_optimizer(grouped), loader())
    assert [g["name"] for g in trainer.optimizers[0].param_groups] == ["body", "rest", "body_steps", "rest_steps"]

    named = with_optimizer(lambda m: torch.optim.AdamW(m.named_parameters(), weight_decay=0.1))
    model = SmallNet()
    early = torch.optim.AdamW(model.named_parameters(), weight_decay=0.1)  # knows of no steps yet
    model.configure_optimizers = lambda: early
    for module in (named, model):
        trainer = make_trainer(quiet(), max_steps=1)
        trainer.fit(module, loader())
        name_of = {id(p): name for name, p in module.named_parameters()}
        for group in trainer.optimizers[0].param_groups:
            assert group["param_names"] == [name_of[id(p)] for p in group["params"]]


def test_a_scheduler_that_counts_groups_finds_those_it_was_built_for(make_trainer) -> None:
    class Halves:
        """None of torch's, as timm's: sets the groups that there were, by their numbers."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.rates = optimizer, [group["lr"] for group in optimizer.param_groups]

        def step(self) -> None:
            self.rates = [rate / 2 for rate in self.rates]
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
                group["lr"] = rate

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Apart(SmallNet):
        def configure_optimizers(self) -> Any:
            parts: tuple[list, list] = ([], [])
            for name, parameter in self.named_parameters():
                parts["weight_quantizer" not in name].append(parameter)
            groups = [{"params": parts[0], "lr": 1.0}, {"params": parts[1], "lr": 2.0}]
            optimizer = torch.optim.AdamW(groups)
            return [optimizer], [{"scheduler": Halves(optimizer), "interval": "step"}]

        def lr_scheduler_step(self, scheduler: Halves, metric: Any) -> None:
            scheduler.step()

    model = Apart()
    trainer = make_trainer(quiet(), max_steps=2)
    trainer.fit(model, loader())
    rate_of = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    of_weight, of_input = (q.relative_step for q in (model.stem.weight_quantizer, model.stem.input_quantizer))
    assert [rate_of[id(p)] for p in (of_weight, model.stem.weight)] == [0.25, 0.5]
    assert rate_of[id(of_input)] == 1.0  # follows when the next batch begins


def test_learning_rate_of_steps(make_trainer) -> None:
    def run(scale: float) -> tuple[dict[str, Tensor], pl.LightningModule]:
        torch.manual_seed(0)
        model = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), 0.1))
        make_trainer(quiet(step_lr_scale=scale), max_steps=1).fit(model, loader(shuffle=False))
        moved = {}
        for name, q in named_quantizers(quantized_layers(model)).items():
            moved[name] = q.relative_step.detach() - 1
        return moved, model

    (one, model), (ten, other) = run(1.0), run(0.1)
    assert torch.equal(model.head.weight, other.head.weight)
    for name, moved in one.items():
        assert torch.allclose(ten[name], moved * 0.1, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("value", [0, -1.0, True, "fast"])
def test_bad_learning_rate_of_steps(value: object) -> None:
    with pytest.raises(ValueError, match="`step_lr_scale` must be a positive number, got"):
        QuantInitCallback(step_lr_scale=value)


def test_lbfgs_has_one_group(make_trainer) -> None:
    model = with_optimizer(lambda m: torch.optim.LBFGS(m.parameters(), 0.1))
    trainer = make_trainer(quiet(), max_steps=2)
    trainer.fit(model, loader())
    check_each_once(model, trainer.optimizers)
    with pytest.raises(ValueError, match="`step_lr_scale` must be 1 with L-BFGS"):
        make_trainer(quiet(step_lr_scale=0.1)).fit(
            with_optimizer(lambda m: torch.optim.LBFGS(m.parameters())), loader()
        )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[1e-4]),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.8)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.8)]
    ),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    every = {name for name, kind in vars(schedulers).items() if isinstance(kind, type)}
    every = {n for n in every if issubclass(getattr(schedulers, n), schedulers.LRScheduler) and not n.startswith("_")}
    assert set(SCHEDULERS) == every - {"LRScheduler"}


class Scheduled(SmallNet):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.dropout.p = 0.0
        self.rates: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        scheduler = SCHEDULERS[self.name](optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "monitor": "train_loss", "strict": False}]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step.*:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_go_on_for_steps_too_and_resume(make_trainer, tmp_path: Path, name: str) -> None:
    start = Scheduled(name)

    def run(epochs: int, resume: Path | None = None, *callbacks: pl.Callback) -> Scheduled:
        model = copy.deepcopy(start)
        trainer = make_trainer(*callbacks, max_epochs=epochs)
        with warnings.catch_warnings():  # torch's own remarks on some schedulers' arguments
            warnings.simplefilter("ignore", UserWarning)
            trainer.fit(model, loader(shuffle=False), ckpt_path=resume)
            trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    plain, quantized = run(4), run(4, None, quiet(step_lr_scale=0.5))
    assert [len(rates) for rates in quantized.rates] == [2] * 16
    assert any(rates != quantized.rates[0] for rates in quantized.rates)
    for ours, theirs in zip(quantized.rates, plain.rates, strict=True):
        if name != "ReduceLROnPlateau":  # it follows the loss
            assert ours[0] == pytest.approx(theirs[0])
        assert ours[1] == pytest.approx(0.5 * ours[0])
    run(2, None, quiet(step_lr_scale=0.5))
    resumed = run(4, tmp_path / "2.ckpt", quiet(step_lr_scale=0.5))
    assert resumed.rates == quantized.rates[8:]
    for key, value in quantized.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_cli_optimizer_is_adopted_and_keeps_no_decay(make_trainer) -> None:
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.3)
    scheduler = schedulers.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    model.configure_optimizers = lambda: ([optimizer], [scheduler])  # what LightningCLI does
    make_trainer(quiet(), max_epochs=2).fit(model, loader())
    check_each_once(model, [optimizer])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.0025, 0.0025]
    make_trainer(quiet(), max_epochs=1).fit(model, loader())  # the same optimizer object again
    check_each_once(model, [optimizer])
    assert len(optimizer.param_groups) == 2


CLI = """
import sys, warnings; sys.path.insert(0, {tests!r}); warnings.simplefilter("ignore")
import torch
from conftest import SmallNet, loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
import lightning_qinit

class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

del SmallNet.configure_optimizers  # the command line brings the optimizer and the scheduler
cli = LightningCLI(SmallNet, Data)
groups = cli.trainer.optimizers[0].param_groups
print("groups", [(type(cli.trainer.optimizers[0]).__name__, g["weight_decay"], round(g["lr"], 6)) for g in groups])
state = cli.model.state_dict()
print("moved", all(bool((v != 1).any()) for name, v in state.items() if name.endswith("relative_step")))
"""


def test_optimizer_and_scheduler_from_the_command_line(tmp_path: Path) -> None:
    script = tmp_path / "cli.py"
    script.write_text(CLI.format(tests=str(Path(__file__).parent.parent)))
    options = ["--trainer.callbacks+=QuantInitCallback", "--trainer.callbacks.step_lr_scale=0.5"]
    options += ["--optimizer=AdamW", "--optimizer.lr=0.01", "--optimizer.weight_decay=0.2"]
    options += ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    options += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    command = [sys.executable, str(script), "fit", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "groups [('AdamW', 0.2, 0.0025), ('AdamW', 0.0, 0.00125)]" in done.stdout
    assert "moved True" in done.stdout


HELD: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),  # refuses a ninth step
    "lambda in a list": lambda o: [schedulers.LambdaLR(o, [lambda step: 0.9**step])],
    "plateau in a mapping": lambda o: {"here": schedulers.ReduceLROnPlateau(o, patience=0, min_lr=[1e-5])},
}


@pytest.mark.parametrize("name", HELD)
def test_a_scheduler_that_the_module_steps_itself_is_as_without_the_callback(make_trainer, name: str) -> None:
    class Held(SmallNet):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.rates: list[list[float]] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)
            self.held = HELD[name](optimizer)
            return optimizer

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            values = self.held.values() if isinstance(self.held, dict) else self.held
            for scheduler in values if isinstance(self.held, (list, dict)) else [self.held]:
                scheduler.step(*[1.0] * ("plateau" in name))
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    model, alone = Held(), Held()
    make_trainer(quiet(), max_epochs=2).fit(model, loader())
    make_trainer(max_epochs=2).fit(alone, loader())
    assert model.rates == [2 * rates for rates in alone.rates]  # of weights, and of steps


def test_steps_go_where_a_bias_is_if_no_optimizer_has_them(make_trainer) -> None:
    def of_matrices_and_vectors(module: nn.Module) -> list[torch.optim.Optimizer]:
        named = dict(module.named_parameters())
        matrices = [p for name, p in named.items() if name.endswith("weight") and p.dim() == 2]
        others = [p for name, p in named.items() if name.endswith("bias") or p.dim() == 4]
        return [torch.optim.Muon(matrices, 0.01), torch.optim.SGD(others, 0.1)]

    class Two(SmallNet):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return of_matrices_and_vectors(self)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    model = Two()
    trainer = make_trainer(quiet())
    trainer.fit(model, loader())  # Muon refuses a vector
    check_each_once(model, trainer.optimizers)


def test_an_optimizer_over_part_of_the_parameters(make_trainer) -> None:
    model = with_optimizer(lambda m: torch.optim.SGD([*m.hidden.parameters(), *m.head.parameters()], 0.1))
    with pytest.warns(UserWarning, match="No optimizer trains stem, body, so the steps of these layers stay as calib"):
        make_trainer(quiet(), max_steps=2).fit(model, loader())
    for name, quantizer in named_quantizers(quantized_layers(model)).items():
        assert torch.equal(quantizer.step, quantizer.initial_step) == name.startswith(("stem", "body")), name


class GAN(pl.LightningModule):
    """Two optimizers, alternating by hand, with schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 36))
        self.critic = nn.Sequential(nn.Linear(36, 40), nn.LeakyReLU(0.2), nn.Linear(40, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        real, noise = batch[0].flatten(1), torch.randn(len(batch[0]), 8, device=self.device)
        self.toggle_optimizer(of_critic)
        scores = self.critic(torch.cat((real, self.generator(noise).detach())))
        target = torch.cat((torch.ones(len(real), 1), torch.zeros(len(real), 1)))
        loss = F.binary_cross_entropy_with_logits(scores, target)
        of_critic.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(of_critic, 1.0)
        of_critic.step()
        self.untoggle_optimizer(of_critic)
        self.toggle_optimizer(of_generator)
        loss = F.binary_cross_entropy_with_logits(self.critic(self.generator(noise)), torch.ones(len(real), 1))
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.log("critic", loss)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters(), 0.01) for part in (self.generator, self.critic)]
        return optimizers, [schedulers.StepLR(optimizer, 1, 0.9) for optimizer in optimizers]


@pytest.mark.parametrize("settings", [{}, {"criterion": "fisher"}, {"step_lr_scale": 0.1}], ids=str)
def test_gan(make_trainer, settings: dict) -> None:
    model, callback = GAN(), quiet(first_last_bits=None, **settings)
    weights = copy.deepcopy(model.state_dict())

    class Check(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert callback.report and trainer.global_step == 0  # calibrated, and nothing has moved
            assert all(torch.equal(pl_module.state_dict()[name], value) for name, value in weights.items())
            assert all(s.last_epoch == 0 for s in pl_module.lr_schedulers())

    trainer = make_trainer(callback, Check(), max_epochs=1)
    trainer.fit(model, loader())
    check_each_once(model, trainer.optimizers)
    for optimizer, part in zip(trainer.optimizers, (model.generator, model.critic), strict=True):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in part.parameters()}
    moved = [not torch.equal(q.step, q.initial_step) for q in named_quantizers(quantized_layers(model)).values()]
    assert trainer.global_step == 8 and all(moved)


def test_gradients_are_clipped_as_those_to_the_step_itself(make_trainer) -> None:
    class Seen(pl.Callback):
        """Parameters, gradients, and what carries the latter to units of the data, before clipping."""

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            units = {
                id(q.relative_step): q.initial_step for q in named_quantizers(quantized_layers(pl_module)).values()
            }
            self.of = {
                name: (p.detach().clone(), p.grad.double(), units.get(id(p), torch.ones(())))
                for name, p in pl_module.named_parameters()
            }

    seen = Seen()
    model = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), 0.5))
    trainer = make_trainer(quiet(), seen, gradient_clip_val=0.01, max_steps=1)
    trainer.fit(model, loader())
    published = torch.stack([(grad * unit).square().sum() for _, grad, unit in seen.of.values()]).sum().sqrt()
    relative = torch.stack([grad.square().sum() for _, grad, _ in seen.of.values()]).sum().sqrt()
    assert 0.1 < published < relative / 3  # in other units the norm would be another
    for name, parameter in model.named_parameters():
        before, grad, _ = seen.of[name]
        expected = before - 0.5 * grad * 0.01 / published
        assert torch.allclose(parameter.double(), expected, rtol=1e-6, atol=1e-8), name
    assert "clip_gradients" not in vars(trainer.precision_plugin)


def test_steps_follow_a_scheduler_that_is_not_torchs(make_trainer) -> None:
    class Warmup:
        """Knows the groups that there are when it is built, as timm's schedulers do."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.bases, self.count = optimizer, [g["lr"] for g in optimizer.param_groups], 0
            optimizer.param_groups[0]["lr"] = 0.0

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

        def step(self) -> None:
            self.count += 1
            for group, base in zip(self.optimizer.param_groups, self.bases, strict=False):
                group["lr"] = base * min(1.0, self.count / 3)

    class Scheduled(SmallNet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 0.01)
            return [optimizer], [{"scheduler": Warmup(optimizer), "interval": "step"}]

        def lr_scheduler_step(self, scheduler: Warmup, metric: Any) -> None:
            scheduler.step()

    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    model = Scheduled()
    make_trainer(quiet(step_lr_scale=0.5), Rates(), max_steps=4).fit(model, loader())
    assert [steps / weights for weights, steps in rates[1:]] == pytest.approx([0.5] * 3) and rates[0] == [0.0, 0.0]
    assert all(not torch.equal(q.step, q.initial_step) for q in named_quantizers(quantized_layers(model)).values())


def test_accumulation_and_clipping(make_trainer) -> None:
    model = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), 0.1))
    trainer = make_trainer(quiet(), accumulate_grad_batches=2, gradient_clip_val=0.5, max_epochs=2)
    trainer.fit(model, loader())
    assert trainer.global_step == 4
    assert all(not torch.equal(q.step, q.initial_step) for q in named_quantizers(quantized_layers(model)).values())
