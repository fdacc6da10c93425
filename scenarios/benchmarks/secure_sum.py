"""CPU of one secure sum, each client's and the server's: privrec against Flower's SecAgg+.

    python scenarios/benchmarks/secure_sum.py [--quick] [--json FILE] [--no-flower]

Both sides run in this one call and this one process, on one core: the figures are CPU seconds
(user and system) of everything that a client does in a round, from the first message to the last,
and of everything that the server does. Vectors are integers from the start; messages are handed
over in memory. A tenth of the devices drops out after it dealt its shares, so that their masks are
recovered. Every sum is compared with the plain one.

* privrec: `ClientSession` and `ServerSession` with the checks of a deployment: rosters and
  confirmations are verified by every client by itself. The figure is the median over a few clients
  that share nothing; the others run on a common memory of verified signatures, to save time.
* Flower: `_flower_secagg.py`, the public pieces of SecAgg+ in the order of its mod and workflow.
* The floor of a client is what its cryptographic primitives cost, each measured in this run and
  counted as often as the protocol needs it: the client cannot cost less in this language and with
  this library. Parsing, Shamir's sharing and everything else come on top.
* Noise is no part of a client's figure; a device's share of it is timed by itself, in a column.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import _flower_secagg as flower
import numpy as np
from _common import Claim, document, machine, print_table, write_json
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from privrec.privacy.discrete import discrete_gaussian
from privrec.randomness import SecretRoot
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import DeviceKey, PrekeyBook, agree, derive, public_of
from privrec.secagg.messages import MASKED_START, PAIR_TAG_BYTES, Stage
from privrec.secagg.roster import ListedDevices, Terms
from privrec.secagg.server import ServerSession
from privrec.secagg.sharing import Graph

MODEL = (bytes(32),)
NOISE_VARIANCE = Fraction(8192**2, 67)
"""Of one share: a clip norm of 2^13 steps, noise multiplier 1, at least 67 survivors."""
POLICY = Policy(minimum=18)
"""Of twenty devices two drop out, which the default would refuse."""
ALONE = 5
"""Clients that verify every signature themselves; their median is the figure."""
PACKAGES = ("privrec", "numpy", "cryptography", "flwr", "pycryptodome")
COLUMNS = (
    ("name", "what"),
    ("devices", "devices"),
    ("entries", "entries"),
    ("client_ms", "client, CPU ms"),
    ("server_ms", "server, CPU ms"),
    ("floor_ms", "floor, ms"),
    ("over_floor", "client / floor"),
    ("noise_ms", "noise, ms"),
    ("bytes_per_entry", "upload, bytes an entry"),
    ("overhead_bytes", "and besides"),
    ("client_ratio", "client, times"),
    ("server_ratio", "server, times"),
)


@dataclass(frozen=True)
class Size:
    """One comparison.

    Args:
        devices: in the roster.
        entries: of the vector.
        ring_bits: 32 or 16.
        peer: Whether Flower runs it too.
    """

    devices: int
    entries: int
    ring_bits: int = 32
    peer: bool = True

    @property
    def dropped(self) -> int:
        """Devices that drop out after they dealt their shares."""
        return self.devices // 10


QUICK = (Size(20, 10_000), Size(20, 10_000, ring_bits=16, peer=False))
FULL = (
    *(Size(devices, entries) for devices in (20, 100) for entries in (10**4, 10**5, 10**6)),
    Size(100, 10**6, ring_bits=16, peer=False),
    Size(500, 10**5, peer=False),
    Size(1000, 10**5, peer=False),
)


@dataclass(frozen=True)
class Sample:
    """One round of one side; of the upload, what is not the vector is the overhead."""

    client_s: float
    server_s: float
    upload_bytes: int
    floor_s: float | None = None
    overhead_bytes: int = 0


# --------------------------------------------------------------------------- privrec


class Meter:
    """CPU seconds, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: object) -> Any:
        start = time.process_time()
        result = function(*arguments)
        self.seconds += time.process_time() - start
        return result


class Federation:
    """Enrolled devices that take part in round after round."""

    def __init__(self, devices: int) -> None:
        roots = [SecretRoot.known(b"device %d" % number) for number in range(devices)]
        self.books = [PrekeyBook(DeviceKey.derive(root, "device"), root) for root in roots]
        self.identities = [book.key.public for book in self.books]
        self.rounds = 0

    def terms(self, size: Size) -> Terms:
        """Of the next round."""
        self.rounds += 1
        return Terms("benchmark", self.rounds, 0, bytes(32), (size.entries,), (2,), size.ring_bits)

    def round(self, size: Size) -> Sample:
        """One round, measured."""
        terms = self.terms(size)
        prekeys = [book.issue(1, 0)[0] for book in self.books]
        common = ListedDevices(self.identities)
        server_meter, meters = Meter(), {device: Meter() for device in self.identities}
        server = server_meter(ServerSession, terms, prekeys, ListedDevices(self.identities))
        server.publish(MODEL)
        alone = self.identities[size.dropped : size.dropped + ALONE]
        sessions = {
            book.key.public: ClientSession(
                book,
                ListedDevices(self.identities) if book.key.public in alone else common,
                POLICY,
            )
            for book in self.books
        }
        dealers, uploads = self._drive(size, server, sessions, server_meter, meters)
        floor = floor_of(size, sessions[alone[0]], dealers[alone[0]])
        tags = len(dealers[alone[0]]) if sessions[alone[0]]._called().is_sparse else 0
        upload, overhead = uploads[alone[0]], MASKED_START + PAIR_TAG_BYTES * tags
        seconds = median(meters[device].seconds for device in alone)
        return Sample(seconds, server_meter.seconds, upload, floor, overhead)

    def _drive(
        self,
        size: Size,
        server: ServerSession,
        sessions: Mapping[bytes, ClientSession],
        server_meter: Meter,
        meters: Mapping[bytes, Meter],
    ) -> tuple[dict[bytes, set[int]], dict[bytes, int]]:
        """Carry the messages; who dealt shares to whom is returned, and bytes of masked vectors."""
        vector = (np.arange(size.entries) % 1000).astype(np.int32)
        gone = set(self.identities[: size.dropped])
        dealers: dict[bytes, set[int]] = {}
        uploads: dict[bytes, int] = {}
        while not server.done:
            if server.stage is Stage.MASKED:
                dealers = {
                    device: {n for n, dealt in server._deposits.items() if number in dealt.sealed}
                    for device, number in server._numbers.items()
                }
            for device, message in server_meter(server.outbox).items():
                if server.stage > Stage.SHARES and device in gone:
                    continue
                answer = meters[device](answered, sessions[device], server.stage, message, vector)
                if server.stage is Stage.MASKED:
                    uploads[device] = len(answer)
                server_meter(server.receive, device, answer)
            server_meter(server.advance)
        expected = (vector.astype(np.int64) * (size.devices - size.dropped)).astype(
            server.result.total.dtype
        )
        if not np.array_equal(server.result.total, expected):
            raise SystemExit("error: the secure sum is not the plain sum")
        return dealers, uploads


def answered(session: ClientSession, stage: Stage, message: bytes, vector: Any) -> Any:
    """What a client answers."""
    if stage is Stage.SHARES:
        return session.shares(message)
    if stage is Stage.MASKED:
        return session.masked(message, vector, MODEL)
    return session.confirm(message) if stage is Stage.CONFIRM else session.unmask(message)


# --------------------------------------------------------------------------- the floor


def cost(function: Callable[[], object], times: int) -> float:
    """CPU seconds of one call, the least of a few series."""
    series = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(times):
            function()
        series.append((time.process_time() - start) / times)
    return min(series)


def primitives() -> dict[str, float]:
    """CPU seconds of each primitive."""
    signer, private = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
    verifier, signature = signer.public_key(), signer.sign(bytes(32))
    public = public_of(X25519PrivateKey.generate())
    secret, plain = os.urandom(32), os.urandom(64)
    sealed = AESGCM(secret).encrypt(bytes(12), plain, None)
    return {
        "verify": cost(lambda: verifier.verify(signature, bytes(32)), 200),
        "sign": cost(lambda: signer.sign(bytes(32)), 200),
        "agree": cost(lambda: agree(private, public), 200),
        "private": cost(lambda: X25519PrivateKey.from_private_bytes(secret), 200),
        "derive": cost(lambda: derive(secret, "label", secret, secret, 1, 2), 500),
        "seal": cost(lambda: AESGCM(secret).encrypt(bytes(12), plain, None), 500),
        "open": cost(lambda: AESGCM(secret).decrypt(bytes(12), sealed, None), 500),
    }


def mask_cost(entries: int, ring_bits: int) -> float:
    """CPU seconds of one mask over a vector: the bare keystream and the bare addition."""
    size = min(entries * ring_bits // 8, 1 << 16)  # a piece that stays in the cache
    dtype = np.dtype(f"<u{ring_bits // 8}")
    zeros, buffer, vector = bytes(size), np.empty(size + 15, np.uint8), np.zeros(size, np.uint8)
    words, piece = buffer[:size].view(dtype), vector.view(dtype)
    stream = Cipher(algorithms.AES128(bytes(16)), modes.CTR(bytes(16))).encryptor()
    keystream = cost(lambda: stream.update_into(zeros, buffer.data), 200)
    addition = cost(lambda: np.add(piece, words, out=piece), 200)
    opening = cost(
        lambda: Cipher(algorithms.AES128(bytes(16)), modes.CTR(bytes(16))).encryptor(), 200
    )
    return opening + (keystream + addition) * entries * ring_bits / 8 / size


def floor_of(size: Size, session: ClientSession, dealers: set[int]) -> float:
    """What the primitives of one client cost: counted as the protocol has it, measured now."""
    unit, near = primitives(), set(session._called().neighbours)
    masked_with = len(near | dealers)
    return (
        unit["verify"] * (size.devices + size.devices - size.dropped)
        + unit["sign"]
        + unit["private"] * 2
        + unit["agree"] * 2 * masked_with
        + unit["derive"] * (len(near) + len(dealers) + masked_with)
        + unit["derive"] * (len(near) + len(dealers)) * session._called().is_sparse  # tags
        + unit["seal"] * len(near)
        + unit["open"] * len(dealers)
        + mask_cost(size.entries, size.ring_bits) * (masked_with + 1)
    )


def noise_s(size: Size) -> float:
    """CPU seconds of a device's own share of the noise."""
    root = SecretRoot.known(b"noise")
    discrete_gaussian(root.stream("warm"), NOISE_VARIANCE, 10)  # builds the table
    return cost(lambda: discrete_gaussian(root.stream("noise"), NOISE_VARIANCE, size.entries), 1)


# --------------------------------------------------------------------------- rows and claims


def rows_of(sizes: Iterable[Size], repetitions: int, peer: bool) -> list[dict[str, Any]]:
    """A row of each side for every size."""
    rows: list[dict[str, Any]] = []
    federations: dict[int, Federation] = {}
    dealings: dict[int, flower.Round] = {}
    for size in sizes:
        note(f"privrec: {size.devices} devices, {size.entries} entries, {size.ring_bits} bits")
        federation = federations.setdefault(size.devices, Federation(size.devices))
        once = repetitions if size.devices <= 100 else 1
        samples = [federation.round(size) for _ in range(once)]
        ours = as_row("privrec", size, samples) | {"noise_s": noise_s(size)}
        rows.append(ours)
        if peer and size.peer:
            note(f"Flower: {size.devices} devices, {size.entries} entries")
            threshold = Graph().threshold(size.devices)
            if size.devices not in dealings:
                dealings[size.devices] = flower.dealt(size.devices, threshold)
            cpu, server, upload = flower.finished(
                dealings[size.devices], size.entries, size.dropped
            )
            theirs = as_row("Flower SecAgg+", size, [Sample(median(cpu), server, upload)])
            theirs["client_ratio"] = theirs["client_s"] / ours["client_s"]
            theirs["server_ratio"] = theirs["server_s"] / ours["server_s"]
            rows.append(theirs)
        gc.collect()
    return rows


def as_row(name: str, size: Size, samples: list[Sample]) -> dict[str, Any]:
    """Medians over repetitions; the ratio to the floor is taken within each repetition."""
    floors = [sample.floor_s for sample in samples if sample.floor_s is not None]
    over = [sample.client_s / sample.floor_s for sample in samples if sample.floor_s]
    return {
        "name": name if size.ring_bits == 32 else f"{name}, {size.ring_bits} bits",
        "devices": size.devices,
        "entries": size.entries,
        "ring_bits": size.ring_bits,
        "dropped": size.dropped,
        "repetitions": len(samples),
        "client_s": median(sample.client_s for sample in samples),
        "server_s": median(sample.server_s for sample in samples),
        "upload_bytes": samples[0].upload_bytes,
        "overhead_bytes": samples[0].overhead_bytes,
        "floor_s": median(floors) if floors else None,
        "over_floor": median(over) if over else None,
        "client_s_each": [sample.client_s for sample in samples],
        "server_s_each": [sample.server_s for sample in samples],
    }


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """What issue and documents quote; a ratio is that of the largest size that both sides ran."""
    peers = [row for row in rows if "client_ratio" in row]
    largest = max(peers, key=lambda row: (row["devices"], row["entries"]), default=None)
    is_due = largest is not None and (largest["devices"], largest["entries"]) == (100, 10**6)
    ours = [row for row in rows if row.get("floor_s")]
    wide = [row for row in ours if row["ring_bits"] == 32]
    times = "times the CPU of privrec at 100 devices, 1e6 entries, 10 dropped"
    return [
        Claim("client_cpu_ratio", largest["client_ratio"] if is_due else None, 15, times),
        Claim("server_cpu_ratio", largest["server_ratio"] if is_due else None, 25, times),
        Claim(
            "upload_bytes_per_entry",
            max(bytes_per_entry(row) for row in wide),
            4,
            "bytes of the vector; the constant overhead has a column of its own",
            "at most",
        ),
        Claim(
            "client_over_floor",
            max(row["over_floor"] for row in ours),
            1.5,
            "times the floor of its own primitives, the worst of all rows",
            "at most",
        ),
    ]


def bytes_per_entry(row: Mapping[str, Any]) -> float:
    """Bytes of an upload for each entry, without the constant overhead of ours."""
    return float((row["upload_bytes"] - row["overhead_bytes"]) / row["entries"])


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the table shows it."""
    in_ms = {
        f"{name}_ms": 1e3 * value
        for name in ("client", "server", "floor", "noise")
        if (value := row.get(f"{name}_s")) is not None
    }
    return {
        **row,
        **in_ms,
        "entries": f"{row['entries']:,}",
        "bytes_per_entry": round(bytes_per_entry(row), 2),
    }


def note(text: str) -> None:
    """A line on standard error, so that standard output is the table alone."""
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    peer = not options.no_flower
    if peer and not flower.available():
        parser().error(
            "flwr is not installed, and the benchmark runs both sides in one environment. Install "
            "it with pip install flwr, or measure privrec alone with --no-flower."
        )
    about = machine(*PACKAGES)
    rows = rows_of(QUICK if options.quick else FULL, 1 if options.quick else 3, peer)
    checked = claims_of(rows)
    print_table("CPU of one secure sum, a tenth dropped out", COLUMNS, [shown(r) for r in rows])
    for claim in checked:
        print(claim)
    if options.json:
        write_json(options.json, document(rows, checked, about))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="CPU seconds of one secure sum: privrec against Flower's SecAgg+.",
        epilog="example: secure_sum.py --json secure_sum.json (about ten minutes)",
    )
    made.add_argument("--quick", action="store_true", help="20 devices and 10,000 entries only")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    made.add_argument("--no-flower", action="store_true", help="measure privrec alone")
    return made


if __name__ == "__main__":
    main()
