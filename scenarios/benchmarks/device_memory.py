"""How much memory a device of each capacity needs for a round, at a million items.

Each figure is the peak resident memory of a process of its own, above that of the idle interpreter
with everything imported: the model received, the local round, and the vector to send.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _common import Claim, document, machine, print_table, write_json

from privrec.device.tier import Federation
from privrec.run.costs import peak_bytes
from privrec.run.plan import BYTES_A_COEFFICIENT, Plan
from privrec.scenario.load import Scenario

ITEMS, USERS, DIM, BLOCK, HISTORY = 1_000_000, 1000, 64, 16, 50
CAPACITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)
MIB = 2**20
SYSTEMS = {
    "fold": "",
    "rows": 'popularity = "public"',
    "dims": 'nesting = "dims"',
}


def scenario(system: str, loss: str, block: int = BLOCK) -> Scenario:
    """Four equal tiers of one system of coordinates, over a million items."""
    tiers = ", ".join(f"{{ capacity = {c}, share = 0.25 }}" for c in CAPACITIES)
    bias = "true" if loss == "bce" else "false"
    return Scenario.from_toml(
        f'name = "memory"\n[data]\nsource = "synthetic"\nitems = {ITEMS}\n'
        f"[model]\ndim = {DIM}\nblock = {block}\nitem_bias = {bias}\n"
        f"[devices]\n{SYSTEMS[system]}\ntiers = [{tiers}]\n"
        f'[train]\nloss = "{loss}"\n[privacy]\nnoise = "none"\n'
    )


def measured(system: str, loss: str, tier: int) -> dict[str, Any]:
    """One device's round."""
    made = scenario(system, loss, 1 if system == "dims" else BLOCK)
    plan = Plan.of(made, ITEMS, USERS)
    federation = plan.federation
    held, rng = federation.tiers[tier], np.random.default_rng(0)
    history = rng.choice(held.model.vectors.items, HISTORY, replace=False)
    model = rng.normal(0, 0.01, held.layout.size).astype(np.float32)
    peak = peak_bytes(plan, held, model, history.astype(np.int32))
    sent = held.layout.size * BYTES_A_COEFFICIENT
    return {
        "name": f"{system} {loss} {held.capacity:g}",
        "nesting": system,
        "loss": loss,
        "capacity": held.capacity,
        "upload_mib": sent / MIB,
        "peak_mib": None if peak is None else peak / MIB,
        "upload_share": _share(federation, tier),
    }


def _share(federation: Federation, tier: int) -> float:
    """Item memory that is sent over the whole one, without dense weights and biases."""
    whole, own = federation.layout, federation.tiers[tier].layout
    return own.slots * own.block / (whole.slots * whole.block)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    about = machine()
    tiers = (3,) if options.quick else (0, 1, 2, 3)
    rows = [measured(system, loss, t) for system, loss in WANTED for t in tiers]
    weak = [row for row in rows if row["capacity"] == CAPACITIES[-1]]
    claims = [
        Claim(
            f"device_mib_1_64_{row['nesting']}_{row['loss']}", row["peak_mib"], 24, "MiB", "at most"
        )
        for row in weak
    ]
    claims.append(
        Claim(
            "upload_share_1_64", max(r["upload_share"] for r in weak) * 64, 1, "of 1/64", "at most"
        )
    )
    columns = [(key, key.replace("_", " ")) for key in rows[0]]
    print_table(f"One device's round, {ITEMS:,} items of {DIM} dimensions", columns, rows)
    for claim in claims:
        print(claim)
    if options.json:
        write_json(options.json, document(rows, claims, about))


WANTED = (("fold", "ials"), ("fold", "bce"), ("rows", "ials"), ("rows", "bce"), ("dims", "ials"))


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: device_memory.py --quick --json memory.json",
    )
    made.add_argument("--quick", action="store_true", help="only devices of capacity 1/64")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    return made


if __name__ == "__main__":
    main()
