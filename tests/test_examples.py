"""The examples as a user runs them: in a process of their own wherever something is trained."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    search = {"PYTHONPATH": str(Path(__file__).parent)}  # for `extension`
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=300, env={**os.environ, **search}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs cli.py here, for what ends before anything is trained."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", *arguments])
        runpy.run_path(str(EXAMPLES / "cli.py"), run_name="__main__")

    return call


@pytest.fixture
def cli_config(cli: Callable, capsys: pytest.CaptureFixture) -> Callable[..., dict]:
    """The settings of the callback that cli.py prints."""

    def printed(*arguments: str) -> dict:
        with pytest.raises(SystemExit, match="^0$"):
            cli(*arguments, "--print_config")
        return yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]

    return printed


def bits_of_weights(folder: Path) -> dict[str, int]:
    """From the report that lies beside a run's logs."""
    rows = json.loads(next((folder / "runs").rglob("quantization.json")).read_text())
    return {row["layer"]: row["bits"] for row in rows if row["what"] == "weight"}


def test_quickstart_and_deploy(tmp_path: Path) -> None:
    out = run(tmp_path, str(EXAMPLES / "quickstart.py"), "--epochs=2", "--qat-epochs=1")
    table = out[out.index("start ") :].splitlines()
    assert [line.split("  ")[0] for line in table[1:4]] == ["float", "2 bits, optimal", "2 bits, lsq"]
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))

    out = run(tmp_path, str(EXAMPLES / "deploy.py"), "--latency=squeezenet1_1", "--size=64")
    table = out[out.index("over 360 test samples") :].splitlines()
    torch_, written, optimized = (line.split()[-3:] for line in table[1:4])
    assert written[0] == torch_[-1] and int(written[1]) == 360 and float(written[2]) < 1e-4
    assert abs(float(optimized[0][:-1]) - float(torch_[-1][:-1])) < 0.3  # one of 360 images
    assert "times as fast" in out and (tmp_path / "classifier.onnx").stat().st_size < 80_000  # 312 kB in float


def test_cli_reads_the_yaml_and_the_command_line(tmp_path: Path, cli_config: Callable) -> None:
    base = ["--config", str(EXAMPLES / "config.yaml")]
    overrides = ["--trainer.callbacks.weight_bits=2", "--trainer.callbacks.initializer=lsq"]
    callback = cli_config(*base, *overrides)
    assert callback["class_path"] == "lightning_qinit.QuantInitCallback"
    assert callback["init_args"]["weight_bits"] == 2 and callback["init_args"]["initializer"] == "lsq"
    assert callback["init_args"]["overrides"] == {"net.3.*": {"weight_bits": 4}}
    run(
        tmp_path,
        str(EXAMPLES / "cli.py"),
        "fit",
        *base,
        *overrides,
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
    )
    bits = bits_of_weights(tmp_path)
    assert bits["net.0"] == 8 and bits["net.3.conv1"] == 4 and bits["net.4.conv1"] == 2


def test_every_setting_is_reachable_and_defaults_print_clean(cli_config: Callable) -> None:
    short = "--trainer.callbacks+=QuantInitCallback"
    settings = {
        "weight_bits": "null",
        "activation_bits": "3",
        "quantizer": "lightning_qinit.LSQ",
        "initializer": "lightning_qinit.initializers.minmax",
        "weight_quantizer": "{name: apot, normalize: true}",
        "activation_quantizer": "lsq+",
        "weight_initializer": "mse_grid",
        "activation_initializer": "percentile",
        "per_channel": "false",
        "first_last_bits": "null",
        "calibration_batches": "2",
        "criterion": "output",
        "sequential": "true",
        "average_bits": "3.5",
        "recalibrate_batchnorm": "true",
        "skip": "[net.0]",
        "overrides": "{net.8: {activation_bits: 5}}",
        "step_lr_scale": "0.5",
        "log_quantizers": "[error, oscillation]",
        "log_costly_every": "3",
        "log_figures": "0",
        "damp_oscillation": "0.1",
        "freeze_oscillating": "0.02",
        "kernels": "eager",
        "print_report": "false",
        "export": "model.onnx",
    }
    given = [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    arguments = cli_config(short, *given)["init_args"]
    assert arguments == {name: yaml.safe_load(value) for name, value in settings.items()}
    defaults = cli_config(short)["init_args"]
    assert defaults.keys() == settings.keys() and defaults["quantizer"] == "lsq"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how LightningCLI uses jsonargparse
@pytest.mark.parametrize(("value", "error"), [("9", ValueError), ("many", SystemExit)])
def test_bad_setting_is_named(cli: Callable, capsys: pytest.CaptureFixture, value: str, error: type) -> None:
    setting = ["--trainer.callbacks+=QuantInitCallback", f"--trainer.callbacks.weight_bits={value}"]
    with pytest.raises(error) as raised:
        cli(*setting, "--seed_everything=false")
    complaint = str(raised.value) if error is ValueError else capsys.readouterr().err
    assert "weight_bits" in complaint and value in complaint


def test_quantizer_and_initializer_from_outside_the_package(tmp_path: Path) -> None:
    config = yaml.safe_load((EXAMPLES / "config.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"] = {
        "weight_quantizer": {"name": "extension.MidRise", "margin": 0.5},
        "weight_initializer": "extension.three_deviations",
        "weight_bits": 2,
        "overrides": {"net.3.*": {"weight_initializer": "optimal"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=20", "--trainer.enable_checkpointing=true"]
    run(tmp_path, str(EXAMPLES / "cli.py"), "fit", "--config", "config.yaml", *limits)
    bits = bits_of_weights(tmp_path)
    assert bits["net.3.conv1"] == bits["net.4.conv1"] == 2
    state = torch.load(next((tmp_path / "runs").rglob("*.ckpt")), weights_only=True)
    key = "net.4.conv1.weight_quantizer"
    assert not (state["state_dict"][f"{key}.relative_step"] == 1).any()
    settings = next(value for name, value in state["callbacks"].items() if "QuantInitCallback" in name)
    assert settings["weight_quantizer"] == {"name": "extension.MidRise", "margin": 0.5}


def test_benchmarks_print_and_write_what_they_measure(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmarks" / "calibration.py")
    out = run(tmp_path, script, "--values", "8000", "--bits", "2", "4", "--repeats", "1", "--json", "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["contestant"] for row in rows} >= {"qinit", "grid"} and "per channel 4 bits  grid" in out
    best = {(row["kind"], row["bits"]): row["errors"][0] for row in rows if row["contestant"] == "qinit"}
    # the search works in float64 and ends in float32, like every other's answer
    assert all(row["errors"][0] >= best[row["kind"], row["bits"]] * (1 - 1e-6) for row in rows)
    single = [
        str(EXAMPLES / "benchmarks" / "qat_step.py"),
        "--single",
        "--models",
        "lstm",
        "--batch",
        "2",
        "--steps",
        "1",
    ]
    figures = json.loads(run(tmp_path, *single, "--contestants", "qinit"))
    assert figures["seconds"] > 0 and figures["bytes"] > 0
