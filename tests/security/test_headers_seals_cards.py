"""Further attempts by what a stranger gives: headers, seals, data sets and tasks of `evaluate`, recipes, jobs, cards.

Each case calls the reader or writer that the commands use; a UserError comes out, or what comes out is harmless.
"""

import contextlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny_tokenizer import byte_tokenizer

from posttrain.config.composition import compose
from posttrain.convert import card
from posttrain.convert.artifacts import add_stop_tokens
from posttrain.convert.training_metadata import FILE, are_facts, collect_facts
from posttrain.data import sealed
from posttrain.errors import UserError
from posttrain.evaluate import settings
from posttrain.models.headers import read_header, read_headers
from posttrain.models.hf_adapter import read_adapter
from posttrain.recipes import layer
from posttrain.sweep import slurm
from posttrain.utils import rundir

HUGE = 10**4000
WEIGHT = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write_header(file, text, body=16):
    raw = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(body))


LONG = '{"w": {"dtype": "F32", "data_offsets": [0, 16], "shape": [' + ",".join(["9" * 4000] * 20_000) + "]}}"
HEADERS = {
    "20,000 sizes of 4,000 digits": LONG,
    "a size of 4,000 digits": {"w": {**WEIGHT, "shape": [HUGE]}},
    "a size beyond 63 bits": {"w": {**WEIGHT, "shape": [2**64, 0], "data_offsets": [0, 0]}},
    "a product that overflows 64 bits to the right size": {"w": {**WEIGHT, "shape": [2**62 + 1, 4]}},
    "a million dimensions": {"w": {**WEIGHT, "shape": [1] * 1_000_000}},
    "17 dimensions": {"w": {**WEIGHT, "shape": [1] * 15 + [2, 2]}},
    "an offset of 4,000 digits": {"w": {**WEIGHT, "data_offsets": [0, HUGE]}},
    "a name twice": '{"w": %s, "w": %s}' % (json.dumps({**WEIGHT, "shape": [4]}), json.dumps(WEIGHT)),  # noqa: UP031
    "a key of a tensor twice": '{"w": {"dtype": "F32", "dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}',
    "metadata that is a number": {"__metadata__": 5, "w": WEIGHT},
    "metadata that is a list": {"__metadata__": [], "w": WEIGHT},
    "metadata with numbers": {"__metadata__": {"format": 1}, "w": WEIGHT},
    "metadata with mappings": {"__metadata__": {"a": {}}, "w": WEIGHT},
    "a dtype that isn't": {"w": {**WEIGHT, "dtype": "F17"}},
    "a dtype that is a list": {"w": {**WEIGHT, "dtype": ["F32"]}},
    "a dtype that is null": {"w": {**WEIGHT, "dtype": None}},
    "a dtype of half a byte and an odd size": {"w": {**WEIGHT, "dtype": "F4", "shape": [33]}},
    "a name of a million characters": {"w" * 1_000_000: WEIGHT},
    "true for a size": {"w": {**WEIGHT, "shape": [4, True]}},
    "a size with a point": {"w": {**WEIGHT, "shape": [4.0]}},
    "not a number": '{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, NaN]}}',
    "three offsets": {"w": {**WEIGHT, "data_offsets": [0, 8, 16]}},
    "one offset": {"w": {**WEIGHT, "data_offsets": [16]}},
    "no offsets": {"w": {**WEIGHT, "data_offsets": None}},
    "an entry that is a list": {"w": ["F32", [4], [0, 16]]},
    "a shape that is a text": {"w": {**WEIGHT, "shape": "22"}},
    "a gap": {"w": {**WEIGHT, "data_offsets": [4, 20]}},
    "an overlap": {"v": {**WEIGHT, "shape": [2], "data_offsets": [0, 8]}, "w": {**WEIGHT, "data_offsets": [4, 20]}},
    "nothing described": {},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies(what, tmp_path):
    write_header(tmp_path / "model.safetensors", HEADERS[what])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"model\.safetensors") as refused:
        read_header(tmp_path / "model.safetensors")
    assert time.monotonic() - began < 10 and len(str(refused.value)) < 2000


def test_an_honest_header_is_read(tmp_path):
    tensors = {"w": torch.zeros(2, 2), "none": torch.zeros(0, 5), "one": torch.zeros(()), "b": torch.zeros(3).bool()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert {name: tensor.shape for name, tensor in read_header(tmp_path / "model.safetensors").items()} == {
        "w": (2, 2), "none": (0, 5), "one": (), "b": (3,),
    }  # fmt: skip


def test_an_index_that_names_another_file_for_a_tensor(tmp_path):
    for name in ("a", "b"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors", "b": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"lists a \(and 1 more\), which no file holds"):
        read_headers(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    save_file({"a": torch.ones(7), "b": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert read_headers(tmp_path)["a"].shape == (1,)  # of the file that the index says, as transformers takes it


@pytest.mark.parametrize("what", ["20,000 sizes of 4,000 digits", "a name twice", "a dtype that isn't"])
def test_an_adapters_header_that_lies(what, tmp_path):
    write_header(tmp_path / "adapter_model.safetensors", HEADERS[what])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x/y"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path)


SEALS = {
    "a file above": lambda d, entries: {**entries, "../outside": entries["rows.arrow"]},
    "a device": lambda d, entries: {**entries, "/dev/zero": {"size": 0, "sha256": "x"}},
    "the folder itself": lambda d, entries: {**entries, ".": {"size": os.stat(d).st_size, "sha256": "x"}},
    "no rows": lambda d, entries: {"counts.json": entries["counts.json"]},
    "nothing": lambda d, entries: {},
    "a list": lambda d, entries: ["rows.arrow"],
    "texts": lambda d, entries: dict.fromkeys(entries, "x"),
    "sizes that are texts": lambda d, entries: {name: {**entry, "size": "5"} for name, entry in entries.items()},
    "hashes that are numbers": lambda d, entries: {name: {**entry, "sha256": 5} for name, entry in entries.items()},
    "hashes of other files": lambda d, entries: dict(zip(entries, reversed(entries.values()), strict=True)),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "rows-x"
    folder.mkdir()
    (folder / "rows.arrow").write_bytes(b"12345")
    (folder / "counts.json").write_bytes(b"{}   ")
    (tmp_path / "outside").write_bytes(b"12345")
    sealed.seal(folder)
    assert sealed.problem(folder, hashes=True) is None
    return folder


@pytest.mark.parametrize("what", SEALS)
def test_a_forged_seal(what, folder):
    entries = json.loads((folder / sealed.SEAL).read_text())
    (folder / sealed.SEAL).write_text(json.dumps(SEALS[what](folder, entries)))
    assert isinstance(sealed.problem(folder, hashes=True), str)


@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder", "one more"])
def test_what_lies_beside_a_seal(what, folder):
    rows = folder / "rows.arrow"
    if what == "one more":
        (folder / "more.arrow").write_bytes(b"")
    else:
        rows.unlink()
    if what == "a link":
        rows.symlink_to(folder.parent / "outside")
    elif what == "a pipe":
        os.mkfifo(rows)
    elif what == "a folder":
        rows.mkdir()
    assert isinstance(sealed.problem(folder, hashes=True), str)


DATASETS = [
    "data=alpaca data.path=README.md cache_dir=/elsewhere", "++cache_dir=/elsewhere data=alpaca data.path=README.md",
    "convert.out=/elsewhere", "hydra.run.dir=/elsewhere", "hydra/launcher=slurm", "hydra.searchpath=[file:///elsewhere]",
    "launch.master_addr=there", "launch.submit=true", "evaluate.out=/elsewhere", "+preview.out=/elsewhere",
    "+logger.wandb.entity=other", "model.path=/elsewhere", "model=hf", "lm_eval.include_path",
]  # fmt: skip


@pytest.mark.parametrize("words", DATASETS)
def test_a_data_set_of_evaluate_may_not_set_what_a_file_may_not(words):
    cfg = compose([f'evaluate.datasets={{a:"{words}"}}'], "evaluate")
    with pytest.raises(UserError, match=r"evaluate\.datasets\.a: "):
        settings.configure_sets(cfg)


TASKS = ["/etc/passwd", "../x", "evil.yaml", "HERE/evil.yaml", "HERE", "", "!function", "a\nb", "evil/../../x"]


def test_a_task_is_named_not_a_file(canary, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "evil.yaml").write_text("task: evil\ndoc_to_text: !function payload.fire\n")
    names = [name.replace("HERE", str(folder)) for name in TASKS]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert manager.match_tasks(["evil"]) and not manager.match_tasks(names)


@pytest.mark.nightly  # half a minute to list all tasks of lm-eval
def test_a_file_is_none_of_lm_evals_tasks(canary, tmp_path):
    pytest.importorskip("lm_eval")
    from posttrain.evaluate import harness

    (tmp_path / "evil.yaml").write_text("task: evil\ndoc_to_text: !function payload.fire\n")
    with pytest.raises(UserError, match="knows no task"):
        harness._find_tasks([str(tmp_path / "evil.yaml")], None)


@pytest.mark.parametrize("more", [[], ["lm_eval.trust_include_path=1"], ["+lm_eval.trust_include_path=yes"],
                                  ["seed=1", "x=lm_eval.trust_include_path=true"]])  # fmt: skip
def test_a_folder_of_tasks_takes_a_word_of_trust(more, canary, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "evil.yaml").write_text("task: evil\ndoc_to_text: !function payload.fire\n")
    options = compose([f"lm_eval.include_path={tmp_path}", "lm_eval.trust_include_path=true"], "evaluate").lm_eval
    with pytest.raises(UserError, match="to the command line"):
        settings.check_lm_eval(options, [f"lm_eval.include_path={tmp_path}", *more])


RECIPES = ["../../etc/passwd", "/etc/passwd", "os", "os.system", "a/b", "llama3_8b_sft_config.__globals__", "[a,b]",
           "{a:1}", "'a b'", "'\n'", "9" * 5000, "x" * 5000, "'${oc.env:HF_TOKEN}'", "true", "1.5"]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_name_of_megatron_bridges(name, canary, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-token-of-whom-it-is")
    with pytest.raises(UserError) as refused:
        layer.apply([f"recipe.name={name}"], "config")
    assert "the-token" not in str(refused.value)


FIRE = "touch $CANARY"
SHELL = [f"x; {FIRE}", f"x $({FIRE})", f"x `{FIRE}`", f"x' ; {FIRE} ; '", f'x" ; {FIRE} ; "', f"x && {FIRE}",
         f"x | {FIRE}", "x > $CANARY", "$CANARY", "x --output=/elsewhere", "x # y", "x\\"]  # fmt: skip
OPTIONS = ("partition", "account", "qos", "constraint", "time")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("value", SHELL)
def test_an_option_of_a_job_stays_one_word(option, value, canary, tmp_path, monkeypatch):
    """Read as Slurm reads the script's head, and run by bash with a stand-in for srun."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda _: 2)
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    asked = slurm.options_of(
        compose(["hydra/launcher=slurm", f'hydra.launcher.{option}="{quoted}"'], with_hydra=True).hydra.launcher
    )
    text = slurm.make_executor(asked, tmp_path)._make_submission_file_text("true", "uid")
    heads = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in heads) and [f"--{option}={value}"] in heads
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "job.sh").write_text(text)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", tmp_path / "job.sh"], env=environment, cwd=tmp_path).returncode == 0


@pytest.fixture
def swapped(tmp_path):
    """A run directory in which `logs` is a folder at one moment and a link to the victim's folder at the next."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    (run / "logs").mkdir(parents=True)
    victim.mkdir()
    (victim / "rank0.log").write_text("the victim's")
    (run / "aside").symlink_to(victim)
    stopped = threading.Event()

    def swap():
        while not stopped.is_set():
            for source, target in (("logs", "folder"), ("aside", "logs"), ("logs", "aside"), ("folder", "logs")):
                with contextlib.suppress(OSError):
                    os.rename(run / source, run / target)
            if (run / "folder").is_dir() and not (run / "logs").is_symlink():  # `make` made another one meanwhile
                shutil.rmtree(run / "logs", ignore_errors=True)

    thread = threading.Thread(target=swap)
    thread.start()
    yield run, victim
    stopped.set()
    thread.join()
    assert [file.name for file in victim.iterdir()] == ["rank0.log"]
    assert (victim / "rank0.log").read_text() == "the victim's"


ATTEMPTS = {
    "append": lambda run: os.close(rundir.append(run, "logs/rank0.log")),
    "write": lambda run: rundir.write_text(run, "logs/rank0.log", "ours", flush=False),
    "make": lambda run: rundir.make(run, "logs/deeper"),
    "remove": lambda run: rundir.remove(run, "logs/rank0.log"),
    "lock": lambda run: os.close(rundir.lock_file(run, "logs/lock")),
    "sweep": lambda run: rundir.sweep(run, lone=True),
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_a_folder_that_becomes_a_link_between_look_and_use(what, swapped):
    run, _ = swapped
    ends = time.monotonic() + 1.5
    done = 0
    while time.monotonic() < ends:
        with contextlib.suppress(UserError, OSError):
            ATTEMPTS[what](run)
            done += 1
    assert done or what == "sweep"


def test_a_file_that_becomes_a_link_is_not_read(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret"
    run.mkdir()
    secret.write_text("the secret")
    (run / "aside").symlink_to(secret)
    (run / "status.json").write_text("{}")
    stopped = threading.Event()

    def swap():
        while not stopped.is_set():
            os.rename(run / "status.json", run / "file")
            os.rename(run / "aside", run / "status.json")
            os.rename(run / "status.json", run / "aside")
            os.rename(run / "file", run / "status.json")

    thread = threading.Thread(target=swap)
    thread.start()
    ends, read = time.monotonic() + 1.5, 0
    try:
        while time.monotonic() < ends:
            with contextlib.suppress(UserError, FileNotFoundError):
                assert rundir.read_text(run, "status.json") == "{}"
                read += 1
    finally:
        stopped.set()
        thread.join()
    assert read


MARKUP = "x\n\n---\nlicense: mit\n---\n# Download it from [here](https://evil.example)<img src=x onerror=alert(1)>"
INJECTED = {
    "the template's name": ["template=custom", f"template.name={json.dumps(MARKUP)}", "template.jinja=x"],
    "the licence": [f"trainer.license={json.dumps(MARKUP)}"],
    "a module": [f"peft.target_modules=[{json.dumps(MARKUP)}]"],
    "a file's name": [f"data.path={json.dumps(MARKUP)}"],
    "a data set's": [f"data.path={json.dumps('hf://owner/set`|' + MARKUP)}"],
    "the base's": [f"model.path={json.dumps('owner/' + MARKUP.replace('/', ''))}"],
    "a format": ["data.format._target_='posttrain.data.formats.[x](y)'"],
    "an address": ["template=custom", "template.name='https://evil.example'", "template.jinja=x"],
    "an address without a scheme": ["template=custom", "template.name=www.evil.example", "template.jinja=x"],
}


@pytest.mark.parametrize("what", INJECTED)
def test_a_card_is_not_written_by_a_configuration(what, tmp_path):
    """Neither its front matter, which a hub acts on, nor links, pictures or headings; as GitHub reads Markdown."""
    from huggingface_hub import ModelCard

    words = ["model=hf", "model.path=owner/base", "data=alpaca", "data.path=my.json", "peft=lora"]
    about = collect_facts(compose([*words, *INJECTED[what]]), {"steps": 1}, None)
    assert are_facts(about)
    card.write_card(tmp_path, "name", about)
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.library_name == "transformers" and found.data.license != "mit"
    assert found.data.base_model in ("owner/base", None) and not found.data.datasets
    for line in found.text.splitlines():
        outside = "".join(line.split("`")[::2])  # between spans of code
        assert line.count("`") % 2 == 0 or line.startswith("```"), line
        assert not any(mark in outside for mark in ("<img", "](", "://", "www.")), line
    headings = [line for line in found.text.splitlines() if line.startswith("#")]
    assert all(heading in ("# name", "## Data", "## Results", "## Settings", "## Check", "## Use")
               for heading in headings if not heading.startswith("# this"))  # fmt: skip


GOOD = {
    "base": "owner/base", "method": "all weights", "license": None, "settings": {"seed": 1}, "results": {"steps": 1},
    "software": {}, "data": {"names": ["a.json"], "format": "Alpaca", "sha256": {"data.path": ["ab"]},
                             "train": {"tokens": 5}},
}  # fmt: skip
FACTS = {
    "a list": [], "nothing": {}, "no method": {**GOOD, "method": None},
    "a base that is a list": {**GOOD, "base": ["x"]},
    "data that are a list": {**GOOD, "data": []},
    "names that are numbers": {**GOOD, "data": {**GOOD["data"], "names": [1]}},
    "names that are a text": {**GOOD, "data": {**GOOD["data"], "names": "hf://x"}},
    "digests that are a text": {**GOOD, "data": {**GOOD["data"], "sha256": {"a": "b"}}},
    "counts that are texts": {**GOOD, "data": {**GOOD["data"], "train": {"tokens": "many"}}},
    "counts that are a list": {**GOOD, "data": {**GOOD["data"], "validation": [1]}},
    "settings that are lists": {**GOOD, "settings": {"a": [1]}}, "results that are a number": {**GOOD, "results": 5},
    "a licence that is a mapping": {**GOOD, "license": {}},
}  # fmt: skip


@pytest.mark.parametrize("what", FACTS)
def test_facts_of_somebody_elses_adapter(what, tmp_path):
    """A card of a merged model is written of them only if they are what an export writes."""
    (tmp_path / FILE).write_text(json.dumps(FACTS[what]))
    assert card.read_facts(tmp_path) is None
    card.write_card(tmp_path, "name", card.read_facts(tmp_path))
    (tmp_path / FILE).write_text(json.dumps(GOOD))
    assert card.read_facts(tmp_path) == GOOD


@pytest.mark.parametrize("ids", ["x", ["x"], [1, "x"], 1.5, {}, [[1]], True, "[x](https://evil.example)"])
def test_end_tokens_of_a_base_that_are_none(ids, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match="eos_token_id"):
        add_stop_tokens(tmp_path, {5}, None)


def test_an_error_has_no_control_characters_of_a_header(tmp_path):
    from posttrain.utils.escape import escape_control

    write_header(tmp_path / "model.safetensors", {"\x1b[31m": {**WEIGHT, "dtype": "\x1b[2J"}})
    with pytest.raises(UserError) as refused:
        read_header(tmp_path / "model.safetensors")
    assert "\x1b" not in escape_control(str(refused.value))  # as every command prints it


def test_a_tokenizers_template_of_a_stranger_has_no_more_time_in_an_export(tmp_path):
    """`turn_ends` renders it, as exports, merges and generation do to learn where an answer ends."""
    from posttrain.generate.decoding import turn_ends

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}"
    began = time.monotonic()
    assert turn_ends(tokenizer) == {tokenizer.eos_token_id}
    assert time.monotonic() - began < 60
