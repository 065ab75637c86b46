"""The whole run configuration as one pydantic model: every key, its default, its unit and what is allowed.

Flower hands the app a flat dictionary with dotted keys; `Settings.from_flat` checks it. The defaults here are the ones in
pyproject.toml (`[tool.flwr.app.config]`), which a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from fedara_flwr.keys import ConfigError, Group, Scalar, nearest, one_line, read_options, walk
from fedara_flwr.training import TrainSettings

Format = Literal["float32", "float16", "int8", "int4"]
LEAST_LENGTH = 8  # tokens of a text
LEAST_NOISE = 0.01  # noise multiplier; below it ε has no meaning
NumberType = Literal["float32", "bfloat16", "int8", "int4"]
Dtype = Literal["auto", NumberType]
QUANTISED = ("int8", "int4")
MAX_RANK = 1024
BUILT_IN_DATA = DOCSTRINGS, FUNCTIONS = ("docstrings", "functions")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class ModelSettings(Group):
    name: str = Field(
        "",
        description="backbone: a local directory or a Hugging Face id of an architecture that can do data.task; '' = the one "
        "that `fedara tasks` names for it",
    )
    dtype: Dtype = Field(
        "auto",
        description="number type of the frozen backbone; adapters, head and optimiser are always float32; auto = on "
        "each machine what a timed product is faster in, float32 or bfloat16; int8, int4: of the blocks' linear layers, the "
        "rest in bfloat16, by the extra `quantised`, for GPUs",
    )
    pooling: Literal["pretrained", "identity"] = Field(
        "identity",
        description="BERT-like poolers: as pre-trained, or frozen at the identity (tanh of the first token's state)",
    )


class AdapterSettings(Group):
    rank: int = Field(12, ge=1, le=MAX_RANK, description="rank slots per module at the start (r0)")
    alpha: float = Field(24.0, gt=0, description="scale of the adapters: alpha / rank, fixed for the whole run")
    target_modules: str = Field(
        "", description="name endings of the linear layers to adapt, comma-separated; '' = all inside the blocks"
    )


class HeadSettings(Group):
    start: Literal["statistics", "means", "random"] = Field(
        "statistics",
        description="where the task has classes: solved from sums that every node tells once, of its classes' features and of "
        "how these spread (statistics), or of the features alone (means); random = drawn, as for tasks without classes, or the "
        "checkpoint's own where its labels are the run's",
    )
    clients: int = Field(0, ge=0, description="nodes that are asked for these sums, drawn by seed; 0 = all")
    rows: int = Field(
        512, ge=0, description="most rows of a node that go into its sums, drawn by seed: the pass costs time; 0 = all"
    )


class StrategySettings(Group):
    fraction_train: float = Field(0.25, gt=0, le=1, description="share of the nodes that train each round")
    min_train_nodes: int = Field(2, ge=1, description="at least so many nodes train each round")
    min_available_nodes: int = Field(
        2, ge=1, description="nodes to wait for at the start, up to node-timeout; a simulation waits for all of its own"
    )
    min_replies: int = Field(1, ge=1, description="good replies below which a round leaves the model as it was")
    max_failed_rounds: int = Field(3, ge=1, description="so many such rounds in a row end the run")
    node_timeout: float = Field(120.0, gt=0, description="seconds to wait for nodes and for their answers to queries")
    round_timeout: float = Field(600.0, gt=0, description="seconds after which a round goes on with the replies it has")
    quorum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the asked nodes whose good replies are enough, the others then have straggler-timeout; 1 = all "
        "have round-timeout",
    )
    straggler_timeout: float = Field(30.0, ge=0, description="seconds that nodes have to reply once there is the quorum")
    max_client_failures: int = Field(
        2,
        ge=1,
        description="so many failures of a client in a row (no reply, an error, a refused update) make it sit out a round; "
        "each further one, twice as many as before",
    )
    weighting: Literal["examples", "tokens", "uniform"] = Field(
        "examples",
        description="weight of a client in every average; tokens: of its rows that are learnt, such as those of answers",
    )
    weight_cap: float = Field(
        3.0, ge=0, description="a client weighs at most this many times the median of the round's clients; 0 = no cap"
    )
    norm_bound: float = Field(
        20.0,
        ge=0,
        description="an update counts if no part moved further than this many times the usual median, each number cut to what "
        "its client's steps reach; 0 = all count as they come",
    )
    robust: Literal["mean", "median", "trimmed-mean", "norm-clip", "multi-krum"] = Field(
        "mean", description="rule that merges updates; all but mean withstand bad ones (docs/robustness.md)"
    )
    attackers: float = Field(
        0.2, ge=0, lt=0.5, description="share of bad clients that trimmed-mean and multi-krum reckon with in a round"
    )
    options: str = Field("", description="keys of the method alone (`fedara methods`), as TOML: 'a = 1' or '{a = 1, b = 2}'")

    def replies_enough(self, asked: int) -> int:
        """Good replies, of so many that were asked for, that make the quorum."""
        return max(self.min_replies, ceil(self.quorum * asked - 1e-9))


class PrivacySettings(Group):
    clip: float = Field(
        0.0, ge=0, description="central differential privacy: length to which each update is cut; 0 = off (docs/privacy.md)"
    )
    noise_multiplier: float = Field(
        0.0, ge=0, description="standard deviation of the noise on a round's sum of updates, over privacy.clip"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ at which the run states its ε; well below 1 / number of clients")

    @property
    def on(self) -> bool:
        """Whether the run is differentially private."""
        return self.clip > 0


class WireSettings(Group):
    down: Format = Field(
        "int8",
        description="numbers that the server sends; int8 and int4 are rounded at random, with a scale per slot; the head's are "
        "never int4, but int8",
    )
    up: Format = Field(
        "int4",
        description="numbers that clients send back; where one of both is not float32, as differences from what came; by int4 "
        "what a head is solved from is int8",
    )
    feedback: bool = Field(
        False, description="error feedback: a node keeps what rounding took from its upload and adds it to its next one"
    )
    budget_mb: float = Field(
        0.0, ge=0, description="megabytes that a run may send in all; its report says what share it took; 0 = none is named"
    )


class DataSettings(Group):
    task: str = Field(
        "classification", min_length=1, description="what is learnt, for example a label for a text; `fedara tasks` lists all"
    )
    name: str = Field(
        "", description="'docstrings' or 'functions', which are built in, or a Hugging Face dataset id; '' = the task's own"
    )
    path: str = Field(
        "",
        description="local parquet, csv, tsv, jsonl, json or arrow file, several with commas between them, or a folder with "
        "train.*, validation.* and test.* (docs/data.md)",
    )
    format: str = Field(
        "", description="how files are written, where that is not found, as TOML: delimiter, encoding, columns (docs/data.md)"
    )
    subset: str = Field("", description="configuration of a Hugging Face dataset; '' = its only one")
    train_split: str = Field("", description="split to train on; '' = 'train'")
    validation_split: str = Field(
        "",
        description="split to validate on; '' = 'validation', 'valid', 'val' or 'dev', '-' = cut from the training rows",
    )
    test_split: str = Field("", description="split for the final test; '' = 'test', '-' = cut from the training rows")
    text_column: str = Field("text", min_length=1, description="column of the text, or of the list of words")
    pair_column: str = Field("", description="column of the second text of a sentence pair; '' = none")
    label_column: str = Field("label", min_length=1, description="column of the label, or of the list of the words' tags")
    labels: str = Field("", description="label names in order, comma-separated; '' = as the data has them")
    partition: Literal["", "iid", "dirichlet", "pathological", "natural", "length"] = Field(
        "",
        description="how training data is split over clients; length = by how long the texts are; '' = dirichlet where the "
        "task's rows have labels or categories, else iid",
    )
    dirichlet_alpha: float = Field(0.5, gt=0, description="partition = 'dirichlet': the smaller, the more skewed")
    labels_per_client: int = Field(
        2, ge=1, description="partition = 'pathological': labels a client sees; 'length': stretches of length"
    )
    id_column: str = Field("", description="partition = 'natural': column that names the owner of a row")
    test: float = Field(0.15, gt=0, lt=1, description="share kept for the final test where the data has no test split")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the training data that the server validates on")
    client_validation: float = Field(
        0.0, ge=0, lt=1, description="share of its own examples on which a client evaluates the model it receives"
    )
    validation_rows: int = Field(
        -1, ge=-1, description="most rows that the server validates on; 0 = all, -1 = the task's own number"
    )
    test_rows: int = Field(-1, ge=-1, description="most rows of the final test; 0 = all, -1 = the task's own number")
    max_length: int = Field(0, ge=0, description="tokens after which a text is cut, 8 or more; 0 = the task's own number")
    options: str = Field("", description="keys of the task alone (`fedara tasks`), as TOML: 'a = 1' or '{a = 1, b = 2}'")


class FleetSettings(Group):
    profiles: str = Field(
        "agx-orin,orin-nano,raspberry-pi-5,phone",
        min_length=1,
        description="devices of a simulation, drawn by seed for each node, comma-separated; one named twice is drawn twice as "
        "often. They set the modelled seconds and joules, and what legend, hetlora, flexlora, flora and fedex-lora give a node",
    )


class OutputSettings(Group):
    # no folder above the runs, no hidden one, nothing that a command line takes for an option
    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*)?$",
        max_length=200,
        description="name of the run directory; '' = made from method and time",
    )
    dir: str = Field("", description="absolute folder of the run directories; '' = FLWR_HOME/runs; APP/runs by `fedara run`")
    resume: str = Field("", description="run to go on with at its next round: a name under run.dir, or an absolute path")
    checkpoint_every: int = Field(
        1, ge=0, description="rounds between checkpoints; the last round and the best one have theirs; 0 = none at all"
    )
    export: Literal["best", "last"] = Field(
        "best",
        description="the round whose model is left: best = by the task's main metric on the server's validation data, of equal "
        "ones the later; needs checkpoints",
    )
    early_stopping_patience: int = Field(
        0,
        ge=0,
        description="evaluations in a row without a gain of the task's main metric on the server's validation data after which "
        "the run ends; schedules and budgets go by num-server-rounds all the same; 0 = off",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="a gain is more than this over the best evaluation before, in the metric's own units"
    )
    track: str = Field("", description="where metrics go besides: tensorboard, wandb, mlflow, trackio, comma-separated")
    threads: int = Field(0, ge=0, description="torch threads of the server's evaluation; 0 = one per core")
    device: Literal["cpu", "cuda"] = Field("cpu", description="in-process engine: where clients train; elsewhere nodes say it")
    together: int = Field(
        1,
        ge=1,
        description="in-process engine: most clients whose steps are one pass over the shared backbone; meant for a GPU. Needs "
        "equal masks and numbers of steps, no dropout, no train.batch-tokens; else, and by Flower, one after the other. The "
        "results are equal to float tolerance, not bit for bit",
    )


OTHER_WORDS = {
    "lr": "train.learning-rate",
    "head-lr": "train.head-learning-rate",
    "batch": "train.batch-size",
    "bs": "train.batch-size",
    "local-epochs": "train.epochs",
    "local-steps": "train.steps",
    "max-steps": "train.steps",
    "rounds": "num-server-rounds",
    "num-rounds": "num-server-rounds",
    "r": "adapter.rank",
    "lora-r": "adapter.rank",
    "lora-alpha": "adapter.alpha",
    "dataset": "data.name",
    "max-len": "data.max-length",
    "max-seq-length": "data.max-length",
    "model": "model.name",
    "algorithm": "method",
    "aggregation": "method",
    "fraction-fit": "strategy.fraction-train",
    "min-available-clients": "strategy.min-available-nodes",
    "min-fit-clients": "strategy.min-train-nodes",
    "patience": "run.early-stopping-patience",
    "min-delta": "run.early-stopping-threshold",
}
"""What others call some of the keys."""


class Settings(Group):
    """The run configuration: what a run does follows from it and the data alone."""

    num_server_rounds: int = Field(10, ge=0, description="rounds; 0 = the solved head alone (head.start)")
    seed: int = Field(42, ge=0, lt=2**62, description="seed of every random stream")
    method: str = Field("fedara", min_length=1, description="federated method: fedara, fedara-static, fedlora, head, …")
    model: ModelSettings = Field(default_factory=ModelSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    head: HeadSettings = Field(default_factory=HeadSettings)
    strategy: StrategySettings = Field(default_factory=StrategySettings)
    privacy: PrivacySettings = Field(default_factory=PrivacySettings)
    wire: WireSettings = Field(default_factory=WireSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    fleet: FleetSettings = Field(default_factory=FleetSettings)
    run: OutputSettings = Field(default_factory=OutputSettings)

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> Settings:
        """Check a flat run configuration; keys that are absent take their defaults.

        Raises:
            ConfigError: for an unknown key, a wrong type or an impossible value.
        """
        known = describe()
        for key, value in flat.items():
            if key not in known:
                other = OTHER_WORDS.get(key.rpartition(".")[2].replace("_", "-").lower())
                meant = f"; did you mean {other!r}?" if other else nearest(key, known)
                own = key.startswith(("adapter.", "strategy.")) and not meant
                hint = "; keys of one method alone go into strategy.options (`fedara methods` lists them)" if own else ""
                raise ConfigError(f"{key} = {value!r}: there is no such key{meant}{hint}")
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            group, _, name = key.rpartition(".")
            (nested.setdefault(group, {}) if group else nested)[name] = value
        try:
            settings = cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(one_line(error, known)) from None
        settings._check_relations()
        return settings

    def _check_relations(self) -> None:
        if self.run.dir and not self.run.dir.startswith(("/", "~")):
            raise ConfigError(
                f"run.dir = {self.run.dir!r}: allowed is an absolute path (Flower runs apps from a folder of its own)"
            )
        tracker_names(self.run.track)
        if not self.num_server_rounds and self.head.start == "random":
            raise ConfigError("num-server-rounds = 0: with head.start = 'random' nothing would be learnt, allowed is 1 or more")
        if 0 < self.data.max_length < LEAST_LENGTH:
            raise ConfigError(f"data.max-length = {self.data.max_length}: allowed are 0 and {LEAST_LENGTH} or more")
        rate = self.train.head_learning_rate
        if -1 < rate < 0:
            raise ConfigError(f"train.head-learning-rate = {rate!r}: allowed are -1.0, 0.0 and more")
        if self.data.partition == "natural" and not self.data.id_column:
            raise ConfigError("data.id-column = '': data.partition = 'natural' needs the column that names the owner")
        if self.wire.feedback and self.wire.up == "float32":
            allowed = [form for form in get_args(Format) if form != "float32"]
            raise ConfigError(f"wire.feedback = True: wire.up = 'float32' rounds nothing, allowed with it are {allowed}")
        self._check_privacy()

    def _check_privacy(self) -> None:
        """With central differential privacy nothing may depend on clients' data but the noised sum (docs/privacy.md)."""
        clip, noise = self.privacy.clip, self.privacy.noise_multiplier
        if not clip and noise:
            raise ConfigError(f"privacy.clip = 0.0: privacy.noise-multiplier = {noise!r} needs a length above 0")
        if not clip:
            return
        if noise < LEAST_NOISE:
            hint = f"allowed is {LEAST_NOISE} or more, 1.0 is usual"
            raise ConfigError(f"privacy.noise-multiplier = {noise!r}: with privacy.clip = {clip!r} {hint}")
        strategy = self.strategy
        bound: list[tuple[str, object, bool, str]] = [
            ("head.start", self.head.start, self.head.start == "random", "'random'"),  # sums without noise
            ("strategy.weighting", strategy.weighting, strategy.weighting == "uniform", "'uniform'"),
            ("strategy.robust", strategy.robust, strategy.robust == "mean", "'mean'"),
            ("data.client-validation", self.data.client_validation, not self.data.client_validation, "0.0"),
            # a round that is done again would be seen twice
            ("run.checkpoint-every", self.run.checkpoint_every, self.run.checkpoint_every <= 1, "1 or 0"),
        ]
        wrong = [
            f"{key} = {value!r}: with privacy.clip allowed is {allowed}" for key, value, good, allowed in bound if not good
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def options(self) -> dict[str, Any]:
        """`strategy.options` as a dictionary; ConfigError where it is no TOML."""
        return read_options("strategy.options", self.strategy.options)

    def to_flat(self) -> dict[str, Scalar]:
        """The inverse of `from_flat`, every key present."""
        return {key: value for key, (value, _) in walk(self).items()}


def tracker_names(names: str) -> tuple[str, ...]:
    """The trackers that `run.track` names, each once.

    Raises:
        ConfigError: there is no such tracker.
    """
    trackers = tuple(dict.fromkeys(name.strip() for name in names.split(","))) if names.strip() else ()
    for name in trackers:
        if name not in TRACKERS:
            hint = f"{', '.join(TRACKERS)}, comma-separated{nearest(name, TRACKERS)}"
            raise ConfigError(f"run.track = {names!r}: allowed are {hint}")
    return trackers


def describe() -> dict[str, Any]:
    """Every key with its pydantic field (default, description, constraints)."""
    return {key: field for key, (_, field) in walk(Settings()).items()}
