"""Every command, every link and every number of the README and of docs/."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from analysis.runs import load_run, load_runs
from analysis.statistics import judged, moved
from tests.conftest import ROOT, here, ranks, run, start
from tests.test_parallel import REDUCED

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
WORDS = {path.stem: " ".join(text.split()) for path, text in PAGES.items()}  # a line may end within a sentence
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)]
INLINE = [" ".join(found.split()) for text in PAGES.values() for found in re.findall(r"`(python [^`]+)`", text)]
COMMANDS = [line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()] + INLINE

# what makes each command short enough for a test: the same program, the same arguments, less of it; {} is a folder
SHORT = {
    "train.py": "--batch_size=2 --micro_batch=1 --block_size=16 --wandb=off --eval_every=0 --probe_every=1"
    " --max_steps=3 --runs_dir={}",
    "scripts/reproduce.py": "--max_steps=3 --seeds 0 --runs_dir={} --record={}/results",
    "scripts/bench.py": "--quick --only experts --out={}/bench",
    "scripts/plot.py": "--out={}",
    "scripts/page.py": "--out={}/page.html",
    "scripts/coord_check.py": "--widths 48 96 --steps=1 --seeds=1 --out={}/check.png",
    "scripts/plan.py": "",
    "scripts/acceptance.py": "--only sign --device=cpu --out={}/acceptance",
    "scripts/without_gpu.py": "--help",
    "scripts/evidence.py": "--help",
    "scripts/report.py": "--help",
    "scripts/faults.py": "--only read_only",
    "scripts/soak.py": "--help",
    "scripts/sweep.py": "--max_steps=2 --dry_run --runs_dir={}",
    "-m data.text": "--name={}/mine",
    "scripts/sample.py": "",
    "-m data.openwebtext": "--help",
    "-m data.nemotron_cc": "--help",
    "-m data.fineweb_edu": "--help",
}
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes seconds a run; tests/test_train.py compiles


def shortened(line: str) -> str:
    """The command without `python `, and with SHORT's options in the place of its own."""
    line = line.removeprefix("python ").replace(" --nanogpt=../nanoGPT", "")  # which is not here
    program = re.match(r"(-m )?\S+", line).group()
    short = "" if "--help" in line else SHORT[program]
    for option in re.findall(r"--\w+", short):
        line = re.sub(rf" {option}(=\S+|( [^-\s]\S*)*)(?=\s|$)", "", line)
    return f"{line} {short}".strip().replace("--dataset=mine", "--dataset={}/mine").replace(" runs/", " {}/")


SHORTENED = {shortened(command) for command in COMMANDS if command.startswith("python ")}


def needed(line: str) -> str | None:
    """The command that must have run before this one, if there is one."""
    if "--resume" in line:
        return line.replace(" --resume", "")
    needs = {"scripts/sample.py": "train.py configs/stress_constant.py", "--dataset={}/mine": "-m data.text"}
    starts = [other for part, other in needs.items() if part in line]
    return next(line for line in SHORTENED if line.startswith(starts[0])) if starts else None


def test_the_first_screen_has_the_two_commands():
    assert [c for c in COMMANDS if c.startswith("make")] == ["make reproduce", "make test"]
    first_screen = README.splitlines()[:20]
    assert sum(line.startswith(("make reproduce", "make test")) for line in first_screen) == 2
    assert len(README.splitlines()) <= 150


def test_ci_runs_the_readmes_test_command():
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", ["reproduce", "test"])
def test_make_targets_set_up_and_call_what_they_say(target):
    said = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0
    assert "-m venv --clear .venv" in said.stdout
    assert "install" in said.stdout
    assert "-r requirements.txt" in said.stdout
    assert {"reproduce": "python scripts/reproduce.py", "test": "python -m pytest"}[target] in said.stdout


@pytest.mark.parametrize("uv_fails", [False, True])
def test_set_up_obeys_pips_settings_and_falls_back_to_pip(uv_fails, tmp_path):
    """With a python and a uv that only write down what they are called with."""
    env, calls = tmp_path / "env", tmp_path / "calls"
    note = f'#!/bin/sh\necho "$(basename "$0") $*" >> {calls}\n'
    made = f'if [ "$2" = venv ]; then mkdir -p {env}/bin && cp "$0" {tmp_path}/uv {env}/bin; fi\n'
    for name, does in (("python", made), ("uv", f"exit {int(uv_fails)}\n")):
        (tmp_path / name).write_text(note + does)
        (tmp_path / name).chmod(0o755)
    command = ["make", "--silent", f"PYTHON={tmp_path}/python", f"VENV={env}", f"{env}/.complete"]
    settings = {"PIP_CONSTRAINT": "requirements.lock", "PIP_INDEX_URL": "https://mirror.test/simple"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert (done.returncode, (env / ".complete").is_file()) == (0, True), done.stderr
    uv, *pip = calls.read_text().splitlines()[3:]  # after the version, the environment, and pip install uv
    assert uv.startswith("uv pip install ") and "--default-index https://mirror.test/simple" in uv
    assert uv.endswith("-r requirements.txt") and "--constraint requirements.lock" in uv
    assert [line.split()[1:4] + line.split()[-2:] for line in pip] == uv_fails * [
        ["-m", "pip", "install", "-r", "requirements.txt"]
    ]
    assert ("uv failed, see above; pip, which is slower, installs instead" in done.stdout) == uv_fails


def test_another_python_has_an_environment_of_its_own():
    command = ["make", "--dry-run", "--always-make", "test", "PYTHON=python3.13", "VENV=.venv-3.13"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert (
        "python3.13 -m venv --clear .venv-3.13" in said
        and ".venv-3.13/bin/python -m pytest" in said
        and ".venv/" not in said
    )


def execute(line: str, folder) -> str:
    """Run a shortened command after what it needs; its output."""
    if before := needed(line):
        execute(before, folder)
    if "--resume" in line:
        (folder / "nano_5m_msign" / "summary.json").unlink()
    words = [word.replace("{}", str(folder)) for word in shlex.split(line)]
    done = (here if words[0] == "-m" else run)(*words, **UNCOMPILED)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


# what another command needs runs there
@pytest.mark.parametrize("line", sorted(SHORTENED - {needed(line) for line in SHORTENED}), ids=str)
def test_python_commands_run(line, tmp_path):
    said = execute(line, tmp_path)
    if line.startswith("scripts/plot.py"):
        assert {path.stem for path in tmp_path.iterdir()} == {"fig1", "fig2", "fig3", "fig4", "heatmaps"}
    if line.startswith("scripts/reproduce.py"):
        assert said.count("no collapse") == 4
        (experiment,) = re.findall(r"--experiment=(\w+)", line)
        for ending in ("png", "svg", "md", "html"):
            assert (tmp_path / f"{experiment}.{ending}").stat().st_size > 100
        assert len(list((tmp_path / "results" / experiment).glob("*/metrics.jsonl.gz"))) == 4


@pytest.mark.parametrize("line", sorted({c for c in COMMANDS if c.startswith("torchrun ")}))
def test_torchrun_commands_run(line, corpus, tmp_path):
    """On two processes that find each other as torchrun's do; tests/test_parallel.py starts torchrun itself."""
    processes, *words = shlex.split(line.replace(" --resume", ""))[1:]
    assert processes == "--nproc_per_node=8"
    short = [*REDUCED, "--max_steps=2", "--eval_batches=2", f"--dataset={corpus}", f"--runs_dir={tmp_path}"]
    for done in ranks(2, *words, *short):
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_quick_evidence_prints_its_tables(tmp_path):
    less = ["--max_steps=2", "--seed=0", "--compile=off", "--eval_every=0", "--probe_every=0"]
    done = run("scripts/evidence.py", "--quick", f"--runs_dir={tmp_path}", *less)
    assert done.returncode == 0, done.stderr
    for arm in ("AdamW", "MSign (attention)", "MSign (W_V,W_O)", "attention off"):
        assert re.search(rf"\| {re.escape(arm)} +\| 1 +\|", done.stdout)
    assert re.findall(r"^\| (\d+) +\| 1 +\|", done.stdout, re.M) == ["10", "100", "1000"]
    assert "steps an application" in done.stdout


def test_reproduce_says_why_an_arm_failed(tmp_path):
    (tmp_path / "ramp-adamw-seed0").mkdir()
    arguments = ["--experiment=ramp", "--arms", "adamw", "--max_steps=3", f"--runs_dir={tmp_path}"]
    done = run("scripts/reproduce.py", *arguments, **UNCOMPILED)
    assert done.returncode == 2
    assert "ramp-adamw-seed0: exit code 2" in done.stderr
    assert "is not a run (no record.json)" in done.stderr


def test_reproduce_stops_its_arms_and_goes_on_where_they_were(tmp_path):
    arguments = ["scripts/reproduce.py", "--arms", "adamw", "msign", "--max_steps=30", f"--runs_dir={tmp_path}"]
    process = start(*arguments, **UNCOMPILED)
    logs = [tmp_path / f"ramp-{arm}-seed0" / "metrics.jsonl" for arm in ("adamw", "msign")]
    while not all(log.exists() and log.stat().st_size > 500 for log in logs):
        time.sleep(0.05)
        assert process.is_alive()
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    saved = [next(log.parent.glob("ckpt_*.pt")) for log in logs]  # both arms have ended, and saved before
    assert all(1 < int(path.stem.split("_")[1]) < 30 for path in saved)
    assert run(*arguments, **UNCOMPILED).returncode == 0
    for log in logs:
        assert [json.loads(line)["iter"] for line in log.read_text().splitlines()] == list(range(1, 31))
        assert '"event": "resumed", "step": ' in (log.parent / "events.jsonl").read_text()
    done = run(*arguments, **UNCOMPILED)  # everything is recorded: nothing is trained again
    assert done.returncode == 0
    assert "already finished" in (tmp_path / "ramp-adamw-seed0.log").read_text()


@pytest.fixture
def copy(tmp_path):
    """The project's code in a folder with a space in its name, to be changed; and what changes a file of it."""
    root = tmp_path / "my copy"
    rooms = ("data", "engine", "remedies", "stability")
    code = [path for room in (".", *rooms) for path in (ROOT / room).glob("*.py")]
    for path in [*code, ROOT / "configs" / "stress_constant.py"]:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())

    def change(name, old, new):
        text = (root / name).read_text()
        assert text.count(old) == 1, f"{name}: {text.count(old)} times {old}"
        (root / name).write_text(text.replace(old, new))

    return root, change


def trained(root, corpus, *options):
    less = ["--batch_size=2", "--micro_batch=2", "--max_steps=4", "--wandb=off", "--compile=off"]
    places = [f"--dataset={corpus}", f"--runs_dir={root}/runs"]
    done = run(root / "train.py", root / "configs/stress_constant.py", *less, *places, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, load_run(root / "runs" / "stress_constant")


def test_an_optimizer_is_added_as_docs_say(copy, corpus):
    root, change = copy
    change(
        "remedies/rivals.py",
        "def muon(",
        "def sgd(groups, cfg):\n    return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.beta1)\n\n\ndef muon(",
    )
    change("remedies/rivals.py", '"zclip": zclip}', '"zclip": zclip, "sgd": sgd}')
    change("config.py", '"zclip"] = opt(', '"zclip", "sgd"] = opt(')
    said, found = trained(root, corpus, "--optimizer=sgd", "--msign_period=2")
    assert found.config["optimizer"] == "sgd" and len(found.steps) == 4 and "no collapse" in said


def test_an_architecture_is_added_as_docs_say(copy, corpus):
    root, change = copy
    change("config.py", 'Literal["gelu", "swiglu"]', 'Literal["gelu", "swiglu", "scaled"]')
    applied = "        return self.W_down(F.gelu(self.W_up(x)))\n"
    skipping = (
        "        if hasattr(self, 'W_skip'):\n            return self.W_down(self.W_skip(F.gelu(self.W_up(x))))\n"
    )
    change("model.py", applied, skipping + applied)
    made = "        self.W_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)\n"
    more = "        if cfg.mlp == 'scaled':\n            self.W_skip = nn.Linear(cfg.d_ff, cfg.d_ff, bias=False)\n"
    change("model.py", made, made + more)
    done = run(
        root / "train.py", root / "configs/stress_constant.py", f"--dataset={corpus}", "--mlp=scaled", "--dry_run"
    )
    assert done.returncode != 0 and "W_skip" in done.stderr  # refused by name
    change("mup.py", '    "W_up": _HIDDEN,\n', '    "W_up": _HIDDEN,\n    "W_skip": _HIDDEN,\n')
    change("msign.py", 'MLP = ("W_up",', 'MLP = ("W_up", "W_skip",')
    every_2 = ["--msign_period=2", "--probe_every=2", "--layers_every=2"]
    _, found = trained(root, corpus, "--mlp=scaled", "--msign_targets=W_skip", *every_2)
    assert found.config["mlp"] == "scaled" and "srank/0.W_skip" in found.layers


CAGED = """
import os, runpy, sys
allowed = sys.argv.pop(1)

def deny(event, args):
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    writes = event == "open" and (set("wax+") & set(args[1] or "") or (args[2] or 0) & flags)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        path = args[0] if not isinstance(args[0], bytes) else args[0].decode()
        if isinstance(path, (str, os.PathLike)) and not os.path.abspath(path).startswith((allowed, os.devnull)):
            raise PermissionError(13, "caged", str(path))
    if event == "socket.connect":
        raise OSError(101, "caged")

sys.addaudithook(deny)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("wandb", ["off", "auto"])
def test_no_network_no_home_and_no_write_access_but_to_the_runs_folder(copy, tmp_path, wandb):
    """From another working directory, with spaces in the paths, and started anew: what it imports is caged, too.

    W&B's own service cannot be reached either, and is done without.
    """
    root, _ = copy
    (tmp_path / "caged.py").write_text(CAGED)
    runs = tmp_path / "all runs"
    runs.mkdir()
    training = [root / "train.py", root / "configs/stress_constant.py", "--dataset=stdlib-small", f"--runs_dir={runs}"]
    options = [f"--wandb={wandb}", "--batch_size=2", "--micro_batch=2", "--max_steps=3", "--compile=off"]
    done = subprocess.run(
        [sys.executable, tmp_path / "caged.py", runs, *training, *options],
        cwd="/", capture_output=True, text=True, timeout=300,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(runs)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DATA: data/ cannot be written; 'stdlib-small' is in" in done.stderr
    assert not (root / "data" / "stdlib-small").exists()
    notes = json.loads((runs / "stress_constant" / "record.json").read_text())["data"]["notes"]
    assert any("cannot be written" in note for note in notes)
    if wandb == "auto":
        assert "note: W&B cannot be used" in done.stdout
        assert '"wandb off"' in (runs / "stress_constant" / "events.jsonl").read_text()


def test_every_picture_of_the_pages_is_there():
    for page, text in PAGES.items():
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (page.parent / picture).stat().st_size > 10_000


def headings(text: str) -> set[str]:
    """A page's headings as GitHub names their anchors."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results" / "REPORT.md"], ids=lambda path: path.stem)
def test_every_link_leads_somewhere_and_every_figure_has_a_caption(page):
    text = page.read_text()
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in headings(target.read_text()), (path, anchor)
    assert all(after.startswith("\n\n*") for after in re.split(r"^!\[.*\)$", text, flags=re.M)[1:])


def test_the_rule_of_the_pages_is_the_codes():
    from stability import collapse

    for number in (
        f"{collapse.WINDOW}-step",
        f"{collapse.RISE} nats above",
        f"for {collapse.STAYS} steps",
        f"least {collapse.CLEARLY} nats",
    ):
        assert number in WORDS["mechanism"]
    assert collapse.SPIKE == 10
    assert "exceeds ten times" in WORDS["mechanism"]


def test_the_number_of_faults_is_the_recorded_one():
    rows = re.findall(r"\| (\d+) \| (\d+) \|$", (ROOT / "results" / "faults.md").read_text(), re.M)
    times, expected = (sum(map(int, column)) for column in zip(*rows, strict=True))
    assert times == expected and f"outcomes of {times} injected faults" in WORDS["trust"]


def test_recorded_runs_say_what_the_pages_say():
    """The claims in words: three seeds an arm, AdamW and MSign (mlp) collapse, MSign (attention) is rescued."""
    for experiment in ("ramp", "constant"):
        runs = judged(load_runs(ROOT / "results" / experiment))
        assert sorted(zip(runs.arm, runs.seed, strict=True)) == sorted(
            (arm, seed) for arm in ("AdamW", "MSign (attention)", "MSign (mlp)", "attention off") for seed in (0, 1, 2)
        )
        for one in runs.itertuples():
            assert one.peak_memory_gib <= 1.5
            assert one.run.code["dirty"] is False
            if one.arm == "MSign (attention)":
                assert one.rescued
            elif one.arm == "attention off":
                assert not one.collapsed
            else:
                assert one.loss > one.floor and one.collapsed


def test_the_recorded_mechanism_is_what_docs_say():
    """The chain in numbers, every seed: what moved first, alignment, Jacobian norms."""
    leads, grown = [], 0
    for one in moved(judged(load_runs(ROOT / "results" / "ramp"))).itertuples():
        onsets, run = one.onsets, one.run
        if one.collapsed:
            assert onsets.first == ["attention logits"]
            assert onsets.signals["first-block gain"] > onsets.signals["attention logits"]
            leads.append(one.end - onsets.signals["attention logits"])
            grown += onsets.grad_norm is not None
        elif one.arm == "MSign (attention)":
            assert onsets.signals["attention logits"] is onsets.signals["first-block gain"] is None
        else:
            assert min(onsets.signals["attention logits"], onsets.signals["first-block gain"]) >= 1900
        alignment, flagged = (run.by_layer(f"jacobian/{key}") for key in ("alignment", "ill_conditioned"))
        assert 0.025 < np.mean(alignment.loc[:, 1000:]) < 0.055
        assert np.mean(alignment.loc[:, :400]) > 0.3
        assert np.mean(flagged.loc[:, :400]) > 0.73
        norms = run.by_layer("jacobian/sigma1").loc[:, 1000:].to_numpy()
        product = run.series("jacobian/product").loc[1000:].median()
        inner, first = np.exp(np.log(norms[1:]).mean()), np.median(norms[0])
        srank = run.series("srank/attention")
        if one.arm == "AdamW":
            assert round(inner, 1) == pytest.approx(3.6, abs=0.11)
            assert srank[25] > 7.5 and 2.9 < srank[500] < 3.2
            assert 1e4 < first < 2.5e4 < 4e4 < product < 7e4
        if one.arm == "MSign (attention)":
            assert 1.75 < inner < 1.95
            assert 3.9e3 < first < 5e3 < 7e3 < product < 8.5e3
    assert (len(leads), min(leads), max(leads), grown) == (6, 732, 1613, 1)


def test_the_first_blocks_gain_and_what_an_application_does_are_what_docs_say():
    gains, norms, read, written = [], [], [], []
    for one in load_runs(ROOT / "results" / "ramp"):
        gain = one.series("residual/gain")
        both = pd.concat([gain, one.by_layer("jacobian/sigma1").loc[0]], axis=1, join="inner").loc[100:]
        gains, norms = [*gains, *both.iloc[:, 0]], [*norms, *both.iloc[:, 1]]
        rms = one.by_layer("residual/rms").loc[0].loc[500:]
        written, read = [*written, *rms], [*read, *(rms / gain[rms.index])]
    assert np.corrcoef(np.log(gains), np.log(norms))[0, 1] == pytest.approx(0.89, abs=0.005)
    assert (round(min(read), 2), round(max(read), 2)) == (0.07, 0.36)
    assert (round(min(written)), round(max(written), -1)) == (8, 520)
    msign = load_run(ROOT / "results/ramp/ramp-msign-seed0")
    for key, before, after in (
        ("srank/attention", 6, 48), ("jacobian/sigma1", 2.7, 1.9), ("attention/max_logit", 296, 46),
    ):  # fmt: skip
        medians = [msign.series(f"{when}_msign/{key}").median() for when in ("before", "after")]
        assert medians == pytest.approx([before, after], rel=0.06)
