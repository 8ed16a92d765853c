"""The experiment as experiment.yaml says it, and which runs it consists of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run. Its result is the file `name`.json."""

    method: str
    lr: str
    seed: int
    recipe: str
    settings: list[str]
    """Overrides of the recipe."""
    old: dict[str, int]
    """Items by probe."""
    positions: int
    """Tokens of each probe at which the KL is taken."""
    looks: list[int]
    """Steps at which the model is looked at, 0 among them."""
    dial: list[float]
    """Places between base (0) and trained model (1) at which it is looked at, too."""

    @property
    def name(self) -> str:
        return f"{self.method}_lr{self.lr}_seed{self.seed}"

    def result(self, results: Path) -> Json | None:
        """What is known of it; None when it was not run, or not like this."""
        file = results / f"{self.name}.json"
        if not file.exists():
            return None
        found, wanted = json.loads(file.read_text()), asdict(self)
        return found if all(found[name] == wanted[name] for name in wanted if name != "recipe") else None


@dataclass(frozen=True)
class Experiment:
    """experiment.yaml, with `short` laid over the rest where that is wanted."""

    values: Json
    settings: list[str]
    """Overrides of every run."""

    @classmethod
    def read(cls, *, short: bool = False, settings: Sequence[str] = ()) -> "Experiment":
        """settings: overrides from the command line."""
        values = yaml.load((HERE / "experiment.yaml").read_text(), Loader=yaml.BaseLoader)  # noqa: S506 - only text
        changes = values.pop("short")
        if not short:
            return cls(values, list(settings))
        methods = {name: values["methods"][name] | {"lr": ["1e-3"]} for name in changes["methods"]}
        values |= changes | {"methods": methods, "tuning": {}, "seeds": ["0"]}
        return cls(values, [*changes["settings"], *settings])

    @property
    def levels(self) -> list[float]:
        return [float(level) for level in self.values["levels"]]

    @property
    def first_seed(self) -> int:
        return int(self.values["seeds"][0])

    @property
    def finalists(self) -> int:
        return int(self.values["finalists"])

    @property
    def methods(self) -> list[str]:
        return list(self.values["methods"])

    @property
    def tuning(self) -> list[str]:
        return list(self.values["tuning"])

    def planned(self) -> Iterator[Run]:
        """All methods and learning rates, then those of the tuning, of the first seed."""
        for method in (*self.methods, *self.tuning):
            yield from self.runs(method, self.first_seed)

    def later(self, rates: Mapping[str, Sequence[str]]) -> Iterator[Run]:
        """The other seeds of methods, at the learning rates that decided something with the first: the best of
        every method before any second."""
        for places in (slice(1), slice(1, 2), slice(2, None)):
            for seed in self.values["seeds"][1:]:
                for method, ranked in rates.items():
                    yield from (run for run in self.runs(method, int(seed)) if run.lr in ranked[places])

    def runs(self, method: str, seed: int) -> Iterator[Run]:
        """One for each learning rate of the method."""
        values = self.values
        own = (values["methods"] | values["tuning"])[method]
        seeded = [f"train.seed={seed}", f"mix.seed={seed}"]
        for lr in own["lr"]:
            yield Run(
                method=method,
                lr=lr,
                seed=seed,
                recipe=str((HERE / values["recipe"]).resolve()),
                settings=[*self.settings, *own["settings"], f"train.lr={lr}", *seeded],
                old={name: int(items) for name, items in values["old"].items()},
                positions=int(values["positions"]),
                looks=[int(step) for step in values["looks"]],
                dial=[float(scale) for scale in values["dial"]],
            )
