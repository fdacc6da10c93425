"""Commands that serve a finished run: recommendations, and what others need to serve its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privrec.cli import console
from privrec.errors import UsageError

if TYPE_CHECKING:
    from privrec.run.recommend import Recommendation


@click.command(
    epilog=console.example(
        "privrec recommend runs/ml-1m-1 --user 42",
        "privrec recommend runs/ml-1m-1 --history liked.txt -k 20",
        "privrec recommend runs/ml-1m-1 --all -o recommendations.parquet",
        "privrec recommend runs/ml-1m-1 --similar-to 318",
    ),
)
@console.run_dir
@click.option(
    "--user", "users", metavar="ID", multiple=True, help="A user of the data set. May be repeated."
)
@click.option(
    "--history",
    type=console.PATH,
    metavar="FILE",
    help="Ids of liked items, one a line, the latest last; a user vector is fitted to them.",
)
@click.option("--similar-to", "item", metavar="ID", help="An item: those nearest to it, by cosine.")
@click.option("--all", "everybody", is_flag=True, help="All users of the data set; needs -o.")
@click.option(
    "-k", "k", type=click.IntRange(1, 10_000), default=10, show_default=True, help="How many items."
)
@click.option(
    "--selector",
    metavar="NAME",
    default="scan",
    show_default=True,
    help="How the best items are found, by a selector that searches; scan is exact.",
)
@click.option(
    "-o", "out", type=console.PATH, metavar="FILE", help="Write a table: .parquet or .csv."
)
@console.data_option
@console.json_option
def recommend(
    directory: Path,
    users: tuple[str, ...],
    history: Path | None,
    item: str | None,
    everybody: bool,
    k: int,
    selector: str,
    out: Path | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Recommend items that users, or a history, do not have yet. The model is that of DIR.

    A list follows from its user's own history, so it is as private as that: no ε covers it.
    """
    given = [bool(users), history is not None, item is not None, everybody]
    if sum(given) != 1:
        found = "several were given" if any(given) else "none was given"
        raise UsageError(
            f"--user, --history, --similar-to or --all: exactly one is needed, and {found}; choose "
            "one"
        )
    console.check_run(directory)
    console.check_data(data_dir)
    if everybody and out is None:
        raise UsageError("--all: the lists of all users are a table; name its file, as in -o r.csv")
    from privrec.run import export as files
    from privrec.run.recommend import TrainedModel, check

    check(k, selector)
    if out is not None:
        files.check_ending(out, files.TABLES)
    model = TrainedModel.read(directory, data_dir=data_dir)
    if item is not None:
        names, lists = None, iter([model.similar(item, k)])
    elif history is not None:
        names, lists = None, model.lists(model.history(history), k, selector=selector)
    else:
        chosen = model.users(None if everybody else users)
        names = model.split.train.user_ids[chosen]
        lists = model.lists(model.owned(chosen), k, selector=selector)
    if out is not None:
        rows = files.write_tables(out, files.tables_of(model, lists, names))
        if as_json:
            console.print_json({"file": str(out), "rows": rows})
        else:
            click.echo(f"wrote {out}: {rows:,} recommendations")
        return
    answers = list(model.named(lists))
    if as_json:
        several = [{"user": user} for user in users] if len(users) > 1 else [{}]
        pairs = zip(several, answers, strict=True)
        console.print_json([{**user, **asdict(each)} for user, found in pairs for each in found])
        return
    titles = [f"Recommendations for user {user}" for user in users]
    if item is not None:
        titles = [f"Items like {item}"]
    elif history is not None:
        titles = [f"Recommendations for the history in {history}"]
    for title, entries in zip(titles, answers, strict=True):
        print_recommendations(entries, title)


@click.command(epilog=console.example("privrec export runs/ml-1m-1 --items items.npz"))
@console.run_dir
@click.option(
    "--items",
    "out",
    type=console.PATH,
    metavar="FILE",
    required=True,
    help="Ids, titles, vectors and biases of the items: .npz or .parquet.",
)
@console.json_option
def export(directory: Path, out: Path, as_json: bool) -> None:
    """Write the model of DIR for programs that score items themselves."""
    console.check_run(directory)
    from privrec.run import export as files
    from privrec.run.recommend import TrainedModel

    files.check_ending(out, files.ITEMS)
    count = files.write_items(out, TrainedModel.read(directory))
    if as_json:
        console.print_json({"file": str(out), "items": count})
    else:
        click.echo(f"wrote {out}: {count:,} items")


def print_recommendations(entries: Sequence[Recommendation], title: str) -> None:
    """Print a list under a title."""
    titled = any(entry.title for entry in entries)
    columns = ("rank", "item", *(["title"] if titled else []), "score")
    rows = [
        (entry.rank, entry.item_id, *([entry.title or ""] if titled else []), f"{entry.score:.3f}")
        for entry in entries
    ]
    console.print_table(title, columns, rows)
