"""What is malformed is refused with value, rule and remedy, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from privrec.cli.main import main

PLAIN = 'name = "tiny"\n[privacy]\nnoise = "none"\n'
TINY = """
name = "tiny"
[data]
users = 30
items = 20
clusters = 2
interactions_per_user = 6
[model]
dim = 4
block = 2
[devices]
sampling_rate = 0.5
[train]
rounds = 2
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 1.0
"""
TABLE = 'name = "tiny"\n[data]\nsource = "table"\n[privacy]\nnoise = "none"\n'


@dataclass(frozen=True)
class Case:
    """Files to write, a command to call, and what its message has to contain."""

    words: tuple[str, ...]
    says: tuple[str, ...]
    files: tuple[tuple[str, str | bytes], ...] = ()
    code: int = 2


def toml(text: str, *says: str) -> Case:
    """A malformed scenario, given to `run`."""
    return Case(("run", "mine.toml", "--out", "out"), says, (("mine.toml", text),))


def settings(setting: str, *says: str, text: str = TINY) -> Case:
    """A malformed override of a good scenario, given to `run`."""
    words = ("run", "mine.toml", "-s", setting, "--out", "out")
    return Case(words, says, (("mine.toml", text),))


def option(*words: str, says: tuple[str, ...], code: int = 2) -> Case:
    """A malformed command line beside a good scenario and an empty run directory."""
    return Case(words, says, (("mine.toml", TINY), ("full/note.txt", "taken")), code)


def table(content: str | bytes, *says: str, name: str = "mine.csv") -> Case:
    """A malformed table."""
    words = ("run", "mine.toml", "--data", name, "--out", "out")
    return Case(words, says, (("mine.toml", TABLE), (name, content)), 4)


def published(source: str, files: dict[str, str | bytes], *says: str) -> Case:
    """A malformed folder of a published format."""
    text = f'name = "tiny"\n[data]\nsource = "{source}"\n[privacy]\nnoise = "none"\n'
    words = ("run", "mine.toml", "--data", "here", "--out", "out")
    placed = tuple((f"here/{name}", content) for name, content in files.items())
    return Case(words, says, (("mine.toml", text), *placed), 4)


SCENARIOS = {
    "missing file": Case(("run", "no.toml", "--out", "out"), ("no.toml", "no such file", "TOML")),
    "a folder": Case(("run", ".", "--out", "out"), ("this is a folder", "name a .toml file")),
    "latin-1": Case(
        ("run", "mine.toml", "--out", "out"),
        ("mine.toml", "byte 9 is not UTF-8", "save the file as UTF-8"),
        (("mine.toml", b'title = "\xe9"'),),
    ),
    "not TOML": toml("name = \n", "not TOML", "line 1", '"name ="', "correct that line"),
    "key twice": toml("name = 'a'\nname = 'b'\n", "not TOML", "line 2", "correct that line"),
    "empty": toml("", "name: it is missing", "[privacy]: the table is missing", "add it"),
    "no noise chosen": toml(
        "name = 'a'\n[privacy]\n", "privacy.noise: it is missing", '"central"', "add it"
    ),
    "name with a slash": toml(
        PLAIN.replace("tiny", "a/b"), 'name = "a/b"', "letters, digits", "change the value"
    ),
    "unknown table": toml(PLAIN + "[modle]\n", "[modle]", "no such table", "[model]?"),
    "unknown key": toml(
        PLAIN + "[train]\nround = 3\n", "train.round = 3", "no such key", "train.rounds?"
    ),
    "key of another table": toml(
        PLAIN + "[train]\ndelta = 0.1\n", "train.delta = 0.1", "no such key", "privacy.delta?"
    ),
    "key above its table": toml(
        "rounds = 3\n" + PLAIN, "rounds = 3", "no such key", "train.rounds?"
    ),
    "table as a value": toml(
        "data = 3\n" + PLAIN, "data = 3", "must be a table", "write it as [data]"
    ),
    "row without a name": toml(
        PLAIN + "[[rows]]\nset = {}\n", "rows[0].name", "it is missing", "add it"
    ),
    "wrong row": toml(
        PLAIN + '[[rows]]\nname = "x"\nset = { "model.dim" = 0 }\n',
        "rows[0] (x)",
        "model.dim = 0",
        "of at least 1",
        "change the value",
    ),
    "two rows of a name": toml(
        PLAIN + '[[rows]]\nname = "x"\n[[rows]]\nname = "x"\n', '"x"', "same name", "rename one"
    ),
}

VALUES = {
    "text for a number": settings(
        "train.rounds=ten", 'train.rounds = "ten"', "a whole number", "the default, 100"
    ),
    "letter O": settings("train.rounds=1O", 'train.rounds = "1O"', "whole number", "change"),
    "fraction": settings("train.rounds=2.5", "train.rounds = 2.5", "whole number", "change"),
    "true for a number": settings("model.dim=true", "model.dim = true", "whole", "default, 32"),
    "number for true": settings("model.item_bias=1", "model.item_bias = 1", "true or false", "re"),
    "zero rounds": settings("train.rounds=0", "train.rounds = 0", "at least 1", "change"),
    "negative seed": settings("run.seed=-1", "run.seed = -1", "at least 0", "change"),
    "not a number": settings("train.server_lr=nan", "train.server_lr = nan", "above 0", "change"),
    "infinite": settings("train.user_l2=inf", "train.user_l2 = inf", "at most 1000", "change"),
    "rate above one": settings(
        "devices.sampling_rate=1.5", "devices.sampling_rate = 1.5", "at most 1", "0.05"
    ),
    "rate of zero": settings("devices.sampling_rate=0", "sampling_rate = 0", "above 0", "change"),
    "delta of one": settings("privacy.delta=1", "privacy.delta = 1", "below 1", "default, 1e-05"),
    "delta too small": settings("privacy.delta=1e-30", "1e-30", "at least 1e-10", "change"),
    "negative clip": settings(
        "privacy.clip_norm=-1", "privacy.clip_norm = -1", "above 0", "change the value"
    ),
    "momentum of one": settings(
        "train.momentum=1", "train.momentum = 1", "below 1", "change",
        text=TINY.replace("[train]", "[train]\nserver_optimizer = 'sgd'"),
    ),
    "momentum of another optimiser": settings(
        "train.momentum=0.5", "train.momentum = 0.5", 'train.server_optimizer = "sgd"', "remove it"
    ),
    "misspelt choice": settings("train.loss=BPR", 'train.loss = "BPR"', 'one of "bce"', '"bpr"?'),
    "unknown choice": settings(
        "run.engine=gpu", 'run.engine = "gpu"', 'one of "cohort", "device"', "the default"
    ),
    "list for a value": settings("model.dim=[8]", "model.dim = [8]", "whole number", "change"),
    "value for a list": settings("run.top_k=10", "run.top_k = 10", "a list of 1 to 10", "[10]"),
    "empty list": settings("run.top_k=[]", "run.top_k = []", "a list of 1 to 10", "change"),
    "zero in a list": settings("run.top_k=[5, 0]", "run.top_k = 0", "at least 1", "change"),
    "cut-off twice": settings("run.top_k=[5, 5]", "[5, 5]", "must not repeat", "use [5]"),
    "block does not divide": settings(
        "model.block=3", "model.block = 3", "must divide model.dim = 4", "use 2"
    ),
    "one block compressed": Case(
        ("run", "mine.toml", "-s", "model.block=4", "-s", "model.compression=2", "--out", "out"),
        ("model.block = 4", "two blocks or more", "use 2"),
        (("mine.toml", TINY),),
    ),
    "warm-up too long": settings(
        "train.warmup_rounds=3", "train.warmup_rounds = 3", "exceed train.rounds = 2", "lower it"
    ),
    "more clusters than items": settings(
        "data.clusters=21", "data.clusters = 21", "data.items = 20", "lower it"
    ),
    "histories too long": settings(
        "data.interactions_per_user=11", "= 11", "data.items / 2 = 10", "lower it"
    ),
    "key of another source": settings(
        "data.user_column=who", '"who"', 'belongs to data.source = "table"', "remove it"
    ),
    "unknown encoding": settings(
        "data.encoding=utf-9", '"utf-9"', "must name a text encoding", "latin-1", text=TABLE
    ),
    "epsilon and multiplier": settings(
        "privacy.epsilon=8", "privacy.epsilon = 8", "excludes", "remove one of them"
    ),
    "neither of them": settings(
        "privacy.noise_multiplier=", "privacy.epsilon is unset", "needs a target", "set privacy."
    ),
    "budget without noise": settings(
        "privacy.epsilon=8", "privacy.epsilon = 8", "no guarantee at all", "remove it", text=PLAIN
    ),
    "noise without a clip": settings(
        "privacy.clip_norm=", "privacy.clip_norm is unset", "needs a bound", "set it"
    ),
    "override without a value": settings("train.rounds", "'train.rounds'", "the form", "example"),
    "override without a key": settings("=3", "'=3'", "the form table.key=value", "for example"),
    "override with an open list": settings("run.top_k=[1", "[1", "neither TOML", "check its"),
    "override of a table": settings("train=3", "train = 3", "no such key", "remove it"),
    "epsilon beyond reach": Case(
        ("plan", "mine.toml", "-s", "privacy.epsilon=0.0001", "-s", "privacy.noise_multiplier=",
         "-s", "train.rounds=1000000", "-s", "privacy.delta=1e-10",
         "-s", "devices.sampling=everybody"),
        ("epsilon 0.0001", "not met", "allow a larger epsilon"),
        (("mine.toml", TINY),),
    ),
    "population that is not": settings(
        "devices.population=31", "devices.population = 31", "30 users", "declare that number"
    ),
}  # fmt: skip

TIERS = {
    "capacity that does not nest": settings(
        "devices.tiers=[{capacity = 1.0, share = 0.5}, {capacity = 0.3, share = 0.5}]",
        "devices.tiers = [", "power of two", "do not nest", "for example [{",
    ),
    "capacity twice": settings(
        "devices.tiers=[{capacity = 0.5, share = 0.5}, {capacity = 0.5, share = 0.5}]",
        "devices.tiers = [", "the same tier", "for example",
    ),
    "capacity twice by its memory": settings(
        "devices.tiers=[{capacity = 1.0, share = 0.5}, {memory_kib = 9999, share = 0.5}]",
        "devices.tiers", "[1.0, 1.0]", "put their shares together",
    ),
    "shares above one": settings(
        "devices.tiers=[{capacity = 1.0, share = 0.5}, {capacity = 0.5, share = 0.6}]",
        "must add up to 1", "they give 1.1", "for example",
    ),
    "shares below one": settings(
        "devices.tiers=[{capacity = 1.0, share = 0.5}]", "must add up to 1", "they give 0.5", "for",
    ),
    "neither capacity nor memory": settings(
        "devices.tiers=[{share = 1.0}]", "one of capacity and memory_kib", "for example"
    ),
    "capacity and memory": settings(
        "devices.tiers=[{capacity = 1.0, memory_kib = 4, share = 1.0}]",
        "one of capacity and memory_kib", "for example",
    ),
    "nobody trains": settings(
        "devices.tiers=[{capacity = 1.0, share = 1.0, weight = 0}]", "nobody does", "for example"
    ),
    "capacity above one": settings(
        "devices.tiers=[{capacity = 2.0, share = 1.0}]",
        "devices.tiers[0].capacity", "2.0", "a tier is a table"
    ),
    "everybody holds nothing": settings(
        "devices.tiers=[{capacity = 0.0, share = 1.0}]", "capacity 0", "nobody does", "for example"
    ),
    "negative capacity": settings(
        "devices.tiers=[{capacity = -1.0, share = 1.0}]", "devices.tiers[0].capacity", "-1.0"
    ),
    "weight above one": settings(
        "devices.tiers=[{capacity = 1.0, share = 1.0, weight = 1.5}]", "tiers[0].weight", "1.5"
    ),
    "negative weight": settings(
        "devices.tiers=[{capacity = 1.0, share = 1.0, weight = -0.5}]", "tiers[0].weight", "-0.5"
    ),
    "share that is no number": settings(
        "devices.tiers=[{capacity = 1.0, share = nan}]",
        "devices.tiers[0].share", "nan", "a share above 0"
    ),
    "no share": settings(
        "devices.tiers=[{capacity = 1.0}]", "devices.tiers[0].share", "a share above 0"
    ),
    "tier as a number": settings(
        "devices.tiers=[0.5]", "devices.tiers[0] = 0.5", "a tier is a table", "for example"
    ),
    "tiers as a number": settings("devices.tiers=0.5", "tiers = 0.5", "a list of 0 to 16", "chang"),
    "tier without an item": settings(
        "devices.tiers=[{capacity = 0.03125, share = 1.0}]",
        "capacity 1/32 of 20 items", "must be an item", "change",
        text=TINY.replace("[train]", "popularity = 'public'\n[train]"),
    ),
    "tier without a block": settings(
        "devices.tiers=[{capacity = 0.25, share = 1.0}]",
        "capacity 1/4 of dim = 4", "a multiple of block = 2", "change",
        text=TINY.replace("[train]", "nesting = 'dims'\n[train]"),
    ),
    "rows without an order": settings(
        "devices.nesting=rows", 'devices.nesting = "rows"', "must come from", "devices.popularity"
    ),
    "an order without rows": settings(
        "devices.nesting=fold", 'popularity = "public" orders rows', "remove popularity",
        text=TINY.replace("[train]", "popularity = 'public'\n[train]"),
    ),
    "unknown nesting": settings(
        "devices.nesting=cols", 'devices.nesting = "cols"', 'one of "fold", "rows"', "did you mean"
    ),
    "rows of a hashed memory": settings(
        "model.compression=2.0", "model.compression = 2.0", "needs a hashed memory", '"fold"',
        text=TINY.replace("[train]", "popularity = 'public'\n[train]"),
    ),
    "dims of a network": settings(
        "model.kind=neumf", 'model.kind = "neumf"', "one input width", '"gmf"',
        text=TINY.replace("[train]", "nesting = 'dims'\n[train]"),
    ),
    "release without an epsilon": settings(
        "devices.popularity=released", "devices.popularity_epsilon is unset", "is charged", "set it"
    ),
    "epsilon without a release": settings(
        "devices.popularity_epsilon=1", "popularity_epsilon = 1", "no release to charge", "remove"
    ),
    "no items to count": settings(
        "devices.popularity_items=0", "popularity_items = 0", "at least 1", "the default, 50"
    ),
    "unknown aggregation": settings(
        "devices.aggregation=mean", '"mean"', 'one of "sum", "contributors"', "change the value"
    ),
    "fair averaging with noise": settings(
        "devices.aggregation=fair_averaging", "plain average", 'privacy.noise = "central"', "set "
    ),
    "fair averaging with momentum": settings(
        "devices.aggregation=fair_averaging", "plain average", '"fedadam"', '"fedavg"',
        text=PLAIN,
    ),
    "fair averaging of rows": settings(
        "devices.aggregation=fair_averaging", "averages folded memories", '"fold"',
        text=PLAIN + "[devices]\npopularity = 'public'\n"
        "[train]\nserver_optimizer = 'fedavg'\n",
    ),
    "implicit ALS with biases": settings(
        "train.loss=ials", 'train.loss = "ials"', "model.item_bias = false", "another loss"
    ),
    "implicit ALS of a network": settings(
        "train.loss=ials", 'model.kind = "gmf"', "another loss",
        text=TINY.replace("[devices]", "kind = 'mlp'\nitem_bias = false\n[devices]"),
    ),
    "implicit ALS of many steps": settings(
        "train.loss=ials", "train.local_steps = 1", "another loss",
        text=TINY.replace("[devices]", "item_bias = false\n[devices]").replace(
            "rounds = 2", "rounds = 2\nlocal_steps = 2"
        ),
    ),
    "no weight of the unobserved": settings(
        "train.unobserved_weight=0", "unobserved_weight = 0", "above 0", "change the value",
        text=TINY.replace("[devices]", "item_bias = false\n[devices]").replace(
            "[train]", "[train]\nloss = 'ials'"
        ),
    ),
}  # fmt: skip

OPTIONS = {
    "unknown command": option("rnu", says=("'rnu'", "no command", "did you mean 'run'?")),
    "unknown data command": option("data", "drop", says=("'drop'", "list, fetch", "--help")),
    "unknown option": option("run", "mine.toml", "--oot", "x", says=("--oot", "No such", "--help")),
    "no scenario": option("run", says=("SCENARIO", "Missing argument", "--help")),
    "out is full": option(
        "run", "mine.toml", "--out", "full", says=("full", "not empty", "privrec resume full")
    ),
    "out is a file": option(
        "run", "mine.toml", "--out", "mine.toml", says=("mine.toml", "this is a file", "another")
    ),
    "out below a file": option(
        "run", "mine.toml", "--out", "mine.toml/x",
        says=("mine.toml/x", "is a file", "name another"),
    ),
    "data is not there": option(
        "run", "mine.toml", "--data", "no", says=("--data no", "no such file or folder", "correct")
    ),
    "nothing to resume": option("resume", "no", says=("no: there is no such folder", "name one")),
    "resume what is no run": option("resume", "full", says=("full", "no run.json", "name one")),
    "report of nothing": option("report", "full", says=("full", "no run.json", "name one")),
    "compare nothing": option("compare", says=("DIR", "Missing argument", "--help")),
    "compare what is no run": option("compare", "full", says=("full", "no run.json", "name one")),
    "recommend to nobody": option(
        "recommend", "full", says=("--all: exactly one", "none was given", "choose one")
    ),
    "recommend to two": option(
        "recommend", "full", "--user", "1", "--history", "mine.toml",
        says=("--all: exactly one", "several were given", "choose one"),
    ),
    "recommend to all on the screen": option(
        "recommend", "full", "--all", says=("full", "no run.json", "name one")
    ),
    "export of nothing": option(
        "export", "full", "--items", "i.npz", says=("full", "no run.json", "name one")
    ),
    "no recommendations": option(
        "recommend", "full", "--user", "1", "-k", "0", says=("0 is not in", "1<=x", "--help")
    ),
    "many recommendations": option(
        "recommend", "full", "--user", "1", "-k", "x", says=("'x'", "valid integer", "--help")
    ),
    "fetch what is not offered": option(
        "data", "fetch", "ml-2m", says=("'ml-2m'", "only ml-100k", "choose one")
    ),
    "describe what is not known": option(
        "data", "describe", "ml-2m", says=('"ml-2m"', "one of", "did you mean")
    ),
    "describe data that is not here": option(
        "data", "describe", "ml-1m", "--data", "full",
        says=("full", "ml-1m.train.rating", "privrec data fetch ml-1m"), code=4,
    ),
}  # fmt: skip

DATA = {
    "no table": Case(
        ("run", "mine.toml", "--out", "out"),
        ("table", "data.path", "--data"),
        (("mine.toml", TABLE.replace("[privacy]", 'path = "no.csv"\n[privacy]')),),
        4,
    ),
    "empty table": table("", "mine.csv", "empty"),
    "missing column": table(
        "user,thing\n1,2\n", "mine.csv", "'item' is not", "set data.user_column"
    ),
    "too few fields": table("user,item\n1,2\n3\n", "mine.csv, line 3", "2"),
    "empty id": table("user,item\n1,2\n,3\n", "mine.csv, line 3"),
    "pair twice": Case(
        ("run", "mine.toml", "-s", "data.duplicates=refuse", "--data", "mine.csv", "--out", "out"),
        ("mine.csv, line 4", "1", "2"),
        (("mine.toml", TABLE), ("mine.csv", "user,item\n1,2\n1,3\n1,2\n")),
        4,
    ),
    "wrong encoding": table(b"user,item\n\xff\xfe,2\n", "mine.csv", "data.encoding"),
    "not a Parquet file": table(b"user,item\n", "mine.parquet", "Parquet", name="mine.parquet"),
    "no time": Case(
        ("run", "mine.toml", "-s", "train.serve_recency=0.5", "--data", "mine.csv", "--out", "out"),
        ("train.serve_recency = 0.5", "the data has no times", "use data with a column of times"),
        (("mine.toml", TABLE), ("mine.csv", "user,item\n1,2\n1,3\n2,2\n2,3\n")),
    ),
    "wrong time": Case(
        ("run", "mine.toml", "-s", "data.time_column=when", "--data", "mine.csv", "--out", "out"),
        ("mine.csv, line 2", "soon"),
        (("mine.toml", TABLE), ("mine.csv", "user,item,when\n1,2,soon\n")),
        4,
    ),
    "too few columns in u.data": published(
        "ml-100k", {"u.data": "1\t2\t3\t4\n1\t3\n"}, "u.data, line 2", "4"
    ),
    "letters in u.data": published(
        "ml-100k", {"u.data": "1\t2\t3\t4\n1\tx\t3\t4\n"}, "u.data, line 2", "x"
    ),
    "rating twice": published(
        "ml-100k", {"u.data": "1\t2\t3\t4\n1\t2\t5\t6\n"}, "u.data, line 2", "1", "2"
    ),
    "commas in ratings.dat": published(
        "ml-1m", {"ratings.dat": "1,2,3,4\n"}, "ratings.dat, line 1", "::"
    ),
    "wrong header": published("ml-20m", {"ratings.csv": "a,b,c,d\n1,2,3,4\n"}, "ratings.csv"),
    "damaged archive": published("ml-1m", {"ml-1m.zip": b"PK\x03\x04 and no more"}, "ml-1m.zip"),
    "UTF-16": published("ml-100k", {"u.data": "1\t2\t3\t4\n".encode("utf-16")}, "u.data", "UTF-16"),
    "NCF without a test file": published(
        "ncf", {"x.train.rating": "0\t1\t1\t0\n0\t2\t1\t0\n"}, "x.test.rating"
    ),
    "NCF negatives cut short": published(
        "ncf",
        {
            "x.train.rating": "0\t1\t1\t0\n0\t2\t1\t0\n",
            "x.test.rating": "0\t0\t1\t0\n",
            "x.test.negative": "(0,0)\t3\tx\n",
        },
        "x.test.negative, line 1",
    ),
    "letters in LightGCN": published(
        "lightgcn", {"train.txt": "0 1 2\n1 x\n", "test.txt": "0 3\n"}, "train.txt, line 2", "x"
    ),
    "LightGCN without a test file": published("lightgcn", {"train.txt": "0 1 2\n"}, "test.txt"),
    "NCF folder without files": published("ncf", {"note.txt": "x"}, "train.rating", "--data"),
}

CASES = {
    **{f"scenario: {name}": case for name, case in SCENARIOS.items()},
    **{f"value: {name}": case for name, case in VALUES.items()},
    **{f"tiers: {name}": case for name, case in TIERS.items()},
    **{f"option: {name}": case for name, case in OPTIONS.items()},
    **{f"data: {name}": case for name, case in DATA.items()},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a state directory of their own."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PRIVREC_DATA", str(tmp_path / "cache"))
    return here


def write(place: Path, files: tuple[tuple[str, str | bytes], ...]) -> None:
    for name, content in files:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def everything(place: Path) -> set[Path]:
    return set(place.parent.rglob("*"))


def refused(words: tuple[str, ...], code: int) -> str:
    """Call the command, see that it fails as it should, and give its message."""
    result = CliRunner().invoke(main, list(words))
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_value_rule_and_remedy_and_nothing_is_left(
    name: str, place: Path
) -> None:
    case = CASES[name]
    write(place, case.files)
    before = everything(place)
    message = refused(case.words, case.code)
    for part in case.says:
        assert part in message
    assert "error:" in message.lower()
    assert everything(place) == before


def test_there_are_enough_cases_to_mean_something() -> None:
    assert len(CASES) >= 60
    assert all(case.code in (2, 4) and case.says for case in CASES.values())


# ------------------------------------------------------------------- a finished run, then damaged


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its state directory beside it."""
    place = tmp_path_factory.mktemp("finished")
    (place / "mine.toml").write_text(TINY)
    words = ["run", str(place / "mine.toml"), "--out", str(place / "run")]
    words += ["-s", "privacy.noise_multiplier=", "-s", "privacy.epsilon=8"]
    words += ["-s", "run.footprint=false"]
    result = CliRunner(env={"PRIVREC_STATE": str(place / "state")}).invoke(main, words)
    assert result.exit_code == 0, result.output
    return place / "run"


@pytest.fixture
def run(finished: Path, place: Path) -> Path:
    """A copy of the finished run in the working directory."""
    copied = place / "run"
    copied.mkdir()
    for path in finished.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def alter_ledger(run: Path) -> None:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace("gaussian", "Gaussian")
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")


def cut_ledger(run: Path) -> None:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    (run / "ledger.jsonl").write_text("\n".join(lines[:-1]) + "\n")


def claim_less(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result["privacy"]["epsilon"] /= 2
    (run / "result.json").write_text(json.dumps(result))


def spoil(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(b"{ spoilt")  # type: ignore[return-value]


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words", "says", "code"),
    [
        (alter_ledger, ("report", "run"), ("ledger.jsonl", "line 2"), 4),
        (cut_ledger, ("report", "run"), ("ledger.jsonl",), 4),
        (claim_less, ("report", "run"), ("result.json",), 4),
        (spoil("run.json"), ("resume", "run"), ("run.json", "restore"), 4),
        (spoil("result.json"), ("report", "run"), ("result.json",), 4),
        (spoil("model.safetensors"), ("recommend", "run", "--user", "1"), ("model", "restore"), 4),
        (remove("model.safetensors"), ("recommend", "run", "--user", "1"), ("no model",), 2),
        (remove("ledger.jsonl"), ("report", "run"), ("ledger.jsonl",), 4),
    ],
)  # fmt: skip
def test_a_damaged_run_is_refused(
    damage: Callable[[Path], None],
    words: tuple[str, ...],
    says: tuple[str, ...],
    code: int,
    run: Path,
) -> None:
    damage(run)
    message = refused(words, code)
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("history", "says", "code"),
    [
        (None, ("liked.txt", "No such file", "correct the path"), 4),
        (b"", ("liked.txt", "it names no item", "write item ids"), 4),
        (b"# only a comment\n\n", ("liked.txt", "it names no item", "one a line"), 4),
        (b"1\n\xff\n", ("liked.txt", "not UTF-8", "save it as UTF-8"), 4),
        (b"1\n999\n", ("999", "no such item"), 2),
        (b"1 2 3\n", ("1 2 3", "no such item"), 2),
    ],
)
def test_a_malformed_history_is_refused(
    history: bytes | None, says: tuple[str, ...], code: int, run: Path, place: Path
) -> None:
    if history is not None:
        (place / "liked.txt").write_bytes(history)
    message = refused(("recommend", "run", "--history", "liked.txt"), code)
    for part in says:
        assert part in message


@pytest.mark.parametrize("user", ["0", "31", "nobody", "", "1.0", "9" * 40])
def test_an_unknown_user_is_refused(user: str, run: Path) -> None:
    message = refused(("recommend", "run", "--user", user), 2)
    assert repr(user) in message
    assert "1 and 30" in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("recommend", "run", "--all"), ("--all", "name its file", "-o r.csv")),
        (("recommend", "run", "--all", "-o", "r.txt"), ("r.txt", "ending", ".parquet, .csv")),
        (("recommend", "run", "--all", "-o", "no/r.csv"), ("no/r.csv", "folder", "make it")),
        (("recommend", "run", "--all", "--user", "1", "-o", "r.csv"), ("several", "choose one")),
        (("recommend", "run", "--user", "1", "--user", "x"), ("'x'", "1 and 30", "one of these")),
        (("export", "run", "--items", "i.csv"), ("i.csv", "ending", ".parquet, .npz")),
    ],
)
def test_what_cannot_be_taken_away_is_refused(
    words: tuple[str, ...], says: tuple[str, ...], run: Path, place: Path
) -> None:
    before = sorted(place.iterdir())
    message = refused(words, 2)
    for part in says:
        assert part in message
    assert sorted(place.iterdir()) == before


def test_comparing_a_run_with_itself_is_refused(run: Path) -> None:
    assert "named twice" in refused(("compare", "run", "run"), 2)
