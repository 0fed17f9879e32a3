"""Generated problems: `modular` and `arithmetic` word problems here, the other tasks from modules of their names.

The same seed gives the same problems on every machine; test and validation do not depend on the size of train.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable

from latent_sft.config.schema import SyntheticConfig
from latent_sft.data import mnns, multiplication, prosqa
from latent_sft.data.formats import Record
from latent_sft.errors import ConfigError

MAX_TRIES = 1000

MODULAR_NAMES = tuple(
    "ada ali amy ana ben bob cal cam dan dee eli eva fay gus hal ian ida ivy jan jay jim jon joy kai kay ken kim lea "
    "lee leo liz lou mae max meg mia moe ned nia pam pat ray rex rob ron roy sam zoe".split()
)
# the verb alone decides the operation, so that a problem can be read without its rationale
MODULAR_VERBS = {
    "+": "gains finds gets wins buys picks earns receives collects adds makes borrows".split(),
    "-": "loses gives sells drops eats spends breaks burns lends mails pays trades".split(),
    "*": "multiplies scales times repeats folds clones stacks copies amplifies boosts raises grows".split(),
}
TIMES_SHARE = 0.4

ARITHMETIC_NAMES = tuple(
    "Alice Ben Carla David Elena Frank Grace Hugo Irene James Kate Liam Maria Noah Olivia Peter Rosa Sam Tina "
    "Victor".split()
)
ARITHMETIC_OBJECTS = tuple(
    "apples books buttons cards coins cookies crayons eggs flowers marbles oranges pencils photos postcards shells "
    "stamps stickers tickets tokens toys".split()
)
# {name} owns the {objects}, {friend} is somebody else, {k} is the second operand
ARITHMETIC_OPENINGS = (
    "{name} has {start} {objects}.",
    "{name} starts the week with {start} {objects}.",
    "There are {start} {objects} on {name}'s desk.",
)
ARITHMETIC_SENTENCES = {
    "+": (
        "{friend} gives {name} {k} more {objects}.",
        "{name} buys {k} more {objects} at the market.",
        "The next day {name} finds {k} {objects} in a drawer.",
        "{k} new {objects} arrive by mail.",
    ),
    "-": (
        "{name} gives {k} of the {objects} to {friend}.",
        "Then {name} loses {k} {objects} on the way home.",
        "{friend} borrows {k} of the {objects}.",
        "{name} sells {k} {objects}.",
    ),
    "*": (
        "After a lucky trade {name} has {k} times as many {objects}.",
        "{friend} helps until there are {k} times as many {objects} as before.",
        "By the weekend the number of {objects} has grown to {k} times what it was.",
    ),
    "/": (
        "{name} puts the {objects} into {k} equal boxes and keeps only one of them.",
        "{name} shares the {objects} equally among {k} people, {friend} included, and goes on with one share.",
    ),
}
ARITHMETIC_QUESTIONS = (
    "How many {objects} does {name} have in the end?",
    "How many {objects} are left for {name}?",
    "What is the number of {objects} that {name} has now?",
)
ARITHMETIC_LARGEST = 1000


def generate(config: SyntheticConfig, without: Iterable[str] = ()) -> dict[str, list[Record]]:
    """Return `train`, `validation` and `test`; no problem occurs twice, within a split or across splits.

    Args:
        config: the task and its sizes.
        without: further problem texts that none is to be the same as. Two multiplications are the same problem where
            their numbers are, in either order.

    Raises:
        ConfigError: the task cannot make that many different problems, or that many steps.
    """
    if config.task == "prosqa" and config.min_steps > prosqa.LONGEST_PATH:
        raise ConfigError(
            f"data.synthetic.min_steps: got {config.min_steps}, expected at most {prosqa.LONGEST_PATH} for task prosqa."
        )
    if config.task == "mnns":
        return {split: _all_mnns(split, found, config) for split, found in mnns.split_problems(config.seed).items()}
    tasks = {"modular": _modular, "arithmetic": _arithmetic, "prosqa": _prosqa, "multiplication": _multiplication}
    sizes = {"test": config.num_test, "validation": config.num_validation, "train": config.num_train}
    seen = {_same(config.task, problem) for problem in without}
    splits = {split: _distinct(config, split, size, tasks[config.task], seen) for split, size in sizes.items()}
    return {split: splits[split] for split in ("train", "validation", "test")}


def _distinct(
    config: SyntheticConfig,
    split: str,
    size: int,
    draw: Callable[[random.Random, SyntheticConfig, str], Record],
    seen: set[str],
) -> list[Record]:
    rng = random.Random(f"{config.task}/{split}/{config.seed}")
    records: list[Record] = []
    tries = 0
    while len(records) < size:
        record = draw(rng, config, f"{config.task}-{split}-{len(records)}")
        same = _same(config.task, record.problem)
        tries = tries + 1 if same in seen else 0
        if tries > MAX_TRIES:
            raise ConfigError(
                f"data.synthetic.num_{split}: got {size}, but after {len(records)} there is hardly another "
                f"{config.task} problem; expected fewer, or a larger "
                f"{'num_digits' if config.task == 'multiplication' else 'max_steps'}."
            )
        if not tries:
            seen.add(same)
            records.append(record)
    return records


def _same(task: str, problem: str) -> str:
    return multiplication.in_order(problem) if task == "multiplication" else problem


def _modular(rng: random.Random, config: SyntheticConfig, row_id: str) -> Record:
    value = rng.randrange(config.modulus)
    words, steps = [f"{rng.choice(MODULAR_NAMES)} has {value} ."], []
    for _ in range(rng.randint(config.min_steps, config.max_steps)):
        sign = "*" if rng.random() < TIMES_SHARE else rng.choice("+-")
        operand = rng.randint(2 if sign == "*" else 1, 5)
        result = _apply(sign, value, operand) % config.modulus
        words.append(f"{rng.choice(MODULAR_VERBS[sign])} {operand} .")
        steps.append(f"{value} {sign} {operand} = {result} ;")
        value = result
    return _record(row_id, " ".join([*words, "how many ?"]), " ".join(steps), str(value), steps)


def _arithmetic(rng: random.Random, config: SyntheticConfig, row_id: str) -> Record:
    name, friend = rng.sample(ARITHMETIC_NAMES, 2)
    value = rng.randint(2, 60)
    filling = {"name": name, "friend": friend, "objects": rng.choice(ARITHMETIC_OBJECTS), "start": value}
    sentences, steps = [rng.choice(ARITHMETIC_OPENINGS).format(**filling)], []
    for _ in range(rng.randint(config.min_steps, config.max_steps)):
        sign, operand = rng.choice(_arithmetic_operations(rng, value))
        sentence = rng.choice(ARITHMETIC_SENTENCES[sign]).format(k=operand, **filling)
        result = _apply(sign, value, operand)
        sentences.append(sentence)
        steps.append(f"<<{value}{sign}{operand}={result}>>")
        value = result
    question = rng.choice(ARITHMETIC_QUESTIONS).format(**filling)
    return _record(row_id, " ".join([*sentences, question]), " ".join(steps), str(value), steps)


def _arithmetic_operations(rng: random.Random, value: int) -> list[tuple[str, int]]:
    # operations that keep the value whole and within 1..ARITHMETIC_LARGEST; one of + and - always does
    found = []
    if value + 50 <= ARITHMETIC_LARGEST:
        found.append(("+", rng.randint(2, 50)))
    if value > 2:
        found.append(("-", rng.randint(2, min(50, value - 1))))
    factor = rng.randint(2, 5)
    if value * factor <= ARITHMETIC_LARGEST:
        found.append(("*", factor))
    divisors = [k for k in range(2, 7) if value % k == 0 and value > k]
    if divisors:
        found.append(("/", rng.choice(divisors)))
    return found


def _prosqa(rng: random.Random, config: SyntheticConfig, row_id: str) -> Record:
    nodes, min_steps = config.max_nodes, config.min_steps
    if config.min_nodes < nodes and "-train-" in row_id:
        nodes = rng.randint(config.min_nodes, nodes)
        min_steps = min_steps if nodes == config.max_nodes else 1  # small graphs have no long paths
    made = prosqa.generate_problem(rng, min_steps=min_steps, max_steps=config.max_steps, num_nodes=nodes)
    return _record(row_id, made.problem, "\n".join(made.steps), made.answer, made.steps)


def _multiplication(rng: random.Random, config: SyntheticConfig, row_id: str) -> Record:
    left, right = (rng.randrange(10 ** (config.num_digits - 1), 10**config.num_digits) for _ in range(2))
    steps = multiplication.steps_of(left, right)
    return _record(
        row_id,
        multiplication.problem_of(left, right),
        " ".join(steps),
        multiplication.answer_of(left, right),
        steps,
    )


def _all_mnns(split: str, problems: list[tuple[int, ...]], config: SyntheticConfig) -> list[Record]:
    records = []
    for number, digits in enumerate(problems):
        *steps, answer = (f"S{total}" for total in mnns.best_trace(digits))
        problem = " ".join(f"D{digit}" for digit in digits)
        labels = mnns.path_labels(digits, config.path_budget, config.path_order)
        mixtures = tuple({f"S{total}": share for total, share in label.items()} for label in labels)
        record = _record(f"mnns-{split}-{number}", problem, " ".join(steps), answer, steps)
        records.append(dataclasses.replace(record, mixtures=mixtures))
    return records


def _apply(sign: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]


def _record(row_id: str, problem: str, cot: str, answer: str, steps: list[str] | tuple[str, ...]) -> Record:
    return Record(id=row_id, problem=problem, cot=cot, cot_answer=answer, answer=answer, steps=tuple(steps))
