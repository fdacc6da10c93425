"""A run that learns from texts: its loop, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privrec import data
from privrec.data.corpus import Corpus, TextSplit
from privrec.errors import DataError
from privrec.evaluate.texts import TextEvaluation, commonest, predict
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot
from privrec.run import directory, popularity
from privrec.run.assembly import TextParts, assemble_texts, check_tiers, data_digest
from privrec.run.loop import Loop
from privrec.run.record import OUTSIDE
from privrec.run.summary import head_of, model_facts, privacy_of, tier_facts, two_digits
from privrec.run.wording import KEPT, REVEALED
from privrec.scenario.load import Scenario


class Texts:
    """What :class:`privrec.run.lifecycle.Kind` asks, for texts and labelled examples."""

    @property
    def loop(self) -> type[Writing]:
        """The loop of such a run."""
        return Writing

    def load(self, scenario: Scenario, data_dir: Path | None) -> TextSplit:
        """The texts or examples, words in the order of the data."""
        split = data.load_texts(scenario.data, data_dir=data_dir)
        check_tiers(scenario, split.train.n_users, split.n_items)
        return split

    def check(self, scenario: Scenario, split: TextSplit) -> None:
        """Refuse texts none of which can be predicted."""
        if not split.heldout.n_users:
            raise DataError(
                "no text or example is held out: metrics need one; use data that has some"
            )

    def describe(self, split: TextSplit) -> dict[str, Any]:
        """Figures of the split."""
        return split.describe()

    def numbered(
        self, scenario: Scenario, split: TextSplit, ledger: Ledger, folder: Path,
        server: SecretRoot, devices: SecretRoot,
    ) -> TextSplit:  # fmt: skip
        """See :func:`privrec.run.popularity.numbered_words`."""
        return popularity.numbered_words(scenario, split, ledger, folder, server, devices)

    def restored(self, folder: Path, split: TextSplit, key: Ed25519PublicKey) -> TextSplit:
        """See :func:`privrec.run.popularity.restored_words`."""
        return popularity.restored_words(folder, split, key)

    def assemble(
        self, scenario: Scenario, train: Corpus, run_id: str, devices: SecretRoot
    ) -> TextParts:
        """See :func:`privrec.run.assembly.assemble_texts`."""
        return assemble_texts(scenario, train, run_id, devices)


@dataclass(kw_only=True)
class Writing(Loop):
    """A run over texts or examples that are here, so that what it predicts can be measured."""

    split: TextSplit
    parts: TextParts
    measured: TextEvaluation | None = field(default=None, init=False)

    def accuracy(self) -> dict[str, float] | None:
        """See :meth:`Loop.accuracy`."""
        every, index = self.scenario.run.eval_every, self.server.index
        if index == self.scenario.train.rounds:
            self.measured = self.measure()
            return self.measured.summary()
        return None if every == 0 or index % every else self.measure().summary()

    def measure(self) -> TextEvaluation:
        """Predictions of the released weights on the texts held out, by the whole softmax."""
        tier = self.parts.federation.tiers[0]
        view = tier.view(self.parts.federation.prefix(self.server.released, tier))
        return predict(self.parts.language, view, self.split.heldout, self.scenario.run.top_k)

    def save(self) -> None:
        """See :meth:`Loop.save`."""
        digest, spent = data_digest(self.split.train), (self.wall_s, self.cpu_s)
        server, states = self.parts.server, self.parts.states
        directory.save(self.out, server, states, self.identity, self.ledger, digest, *spent)

    def payload(self) -> dict[str, Any]:
        """See :meth:`Loop.payload`; in the form that runs of recommenders have."""
        scenario, server, identity = self.scenario, self.server, self.identity.to_json()
        measured = self.measured or self.attempt("accuracy", self.measure)
        tiers = [
            self.attempt(
                f"costs of tier {tier.index + 1}", partial(tier_facts, self.parts, scenario, tier)
            )
            or {"capacity": tier.capacity, "share": tier.share, "weight": tier.weight}
            for tier in self.parts.federation.tiers
        ]
        cuts, heldout = scenario.run.top_k, self.split.heldout
        common = self.attempt("baselines", lambda: commonest(self.split.train, heldout, cuts))
        intervals = None
        if measured is not None:
            intervals = self.attempt("intervals", partial(measured.intervals, scenario.run.seed))
        population = self.split.train.n_users
        return {
            **head_of(scenario, server, identity),
            "holdout": self.split.holdout,
            "metrics": {} if measured is None else measured.summary(),
            "intervals": {name: list(pair) for name, pair in (intervals or {}).items()},
            "baselines": dict.fromkeys(scenario.run.baselines, common) if common else {},
            "metrics_note": OUTSIDE,
            "outside_the_guarantee": [
                "metrics",
                "intervals",
                "baselines",
                "data",
                "cost",
                "tiers",
            ],
            "privacy": privacy_of(scenario, population, server, self.ledger, identity),
            "reveals": self._reveals(),
            "cost": self._cost(tiers[0]),
            "tiers": tiers,
            "model": model_facts(server, scenario),
            "data": identity["data"],
        }

    def _reveals(self) -> dict[str, Any]:
        """What the server was told beside sums; counted for the scheme that asks."""
        if self.parts.columns is None:
            return {"scheme": "private", "statement": KEPT}
        sight = self.parts.columns.sight
        each = max(1, sight.requests)
        return {
            "scheme": "requested",
            "statement": REVEALED,
            "buckets_a_request": sight.buckets / each,
            "words_a_request": sight.words / each,
            "neurons_a_request": sight.neurons / each,
        }

    def _cost(self, strongest: dict[str, Any]) -> dict[str, Any]:
        """Costs of the device that holds most, and of the run."""
        plan = self.server.plan
        device_rounds = self.server.index * plan.expected_cohort
        seconds = two_digits if plan.event.hides_cohorts else float
        names = ("upload_bytes", "download_bytes", "device_peak_bytes", "output_neurons",
                 "output_bytes", "output_multiply_adds", "selection_multiply_adds")  # fmt: skip
        return {
            **{name: strongest.get(name) for name in names},
            "cpu_s_per_device_round": seconds(self.cpu_s / device_rounds)
            if device_rounds
            else None,
            "wall_s": seconds(self.wall_s),
        }
