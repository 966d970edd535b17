"""The command that finds the neurons that say a word: neurons words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lerobot_attn.cli.messages import progress_bar
from lerobot_attn.cli.neurons import neurons
from lerobot_attn.errors import ConfigError
from lerobot_attn.settings import parse_choice

if TYPE_CHECKING:
    from lerobot_attn.analysis.neuron_words import NeuronWords


_AMONG = 10  # a neuron's top words, among which a word is said to be


@neurons.command("words")
def words(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A checkpoint's folder or Hub name: pi0, pi05, smolvla.")
    ],
    wanted: Annotated[
        str | None, typer.Option("--words", help="What to look for, as high,low,up,down,fast,slow.")
    ] = None,
    neuron: Annotated[
        list[str] | None,
        typer.Option(help="Show the top and bottom words of this neuron, as vlm.3.120. May be repeated."),
    ] = None,
    stream: Annotated[str, typer.Option(help="vlm; the other streams have no words.")] = "vlm",
    layers: Annotated[str, typer.Option(help="Layers, as all, -1 or 0,3.")] = "all",
    top: Annotated[int, typer.Option(help="Neurons to list for each word.")] = 20,
    n_words: Annotated[int, typer.Option(help="Words to list for each neuron, up to 30.")] = 10,
    similar: Annotated[
        float, typer.Option(help="Cosine from which on two neurons count as near-duplicates.")
    ] = 0.8,
    n_random: Annotated[
        int, typer.Option(help="Random words that give the chance level; 0 leaves it out.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the random words.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, its folder or a Hub name, instead of the checkpoint's own."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the table here, as CSV.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Take what was found before, if nothing has changed.")
    ] = True,
) -> None:
    """Find the neurons of the language model that say a word, by the weights alone.

    A neuron's value vector (its column of down_proj) goes through the final norm and the unembedding. Lists
    for each word the neurons that point most towards it, beside what random words reach; reads the weights
    in turns, without a GPU. What a neuron says is no proof of what it does: fire it, with controls.
    """
    from lerobot_attn.plugin.neuron_words import neuron_words

    if output is not None:
        _check_output(output, wanted)
    with progress_bar("Reading weights") as progress:
        found = neuron_words(
            policy,
            [] if wanted is None else [word.strip() for word in wanted.split(",")],
            neurons=neuron or [],
            stream=stream,
            layers=parse_choice(layers),
            top=top,
            n_words=n_words,
            similar=similar,
            n_random=n_random,
            seed=seed,
            tokenizer=tokenizer,
            cache=cache,
            progress=progress,
        )
    console = Console()
    for word in found.spellings:
        _print_word(console, found, word)
    _print_ends(console, found)
    _print_notes(found)
    if output is not None:
        try:
            found.table.to_csv(output, index=False)
        except OSError as error:
            raise ConfigError(f"{output}: cannot be written ({error.strerror or error})") from error
        print(f"Wrote {output}: {len(found.table)} rows.")


def _check_output(output: Path, wanted: str | None) -> None:
    """Refuse, before anything is read, what could not be written."""
    if wanted is None:
        raise ConfigError(f"{output}: nothing to write without --words; got only --neuron")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: cannot be written: expected a file in a folder that exists")


def _print_word(console: Console, found: NeuronWords, word: str) -> None:
    rows = found.table[found.table["word"] == word]
    spelt = ", ".join(repr(text) for text in found.spellings[word])
    among = f"{(rows['place'] <= _AMONG).sum()} of {len(rows)} have it among their {_AMONG} top words"
    table = Table(title=f"{word} ({spelt}): {among}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("rank", "neuron", "cosine", "chance", "p", "place"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("like", no_wrap=True)
    # On several lines where the terminal is narrow, so that the numbers keep their places.
    table.add_column("its own top words", overflow="fold", ratio=1, min_width=16)
    for row in rows.itertuples():
        name = f"{row.stream}.{row.layer}.{row.unit}"
        chance, p = ("" if value != value else f"{value:.3f}" for value in (row.chance, row.p))
        like = "" if row.cluster == name else row.cluster
        numbers = str(row.rank), name, f"{row.cosine:.3f}", chance, p, str(row.place)
        table.add_row(*numbers, like, Text(row.top_words))
    console.print(table)


def _print_ends(console: Console, found: NeuronWords) -> None:
    for (layer, unit), rows in found.ends.groupby(["layer", "unit"], sort=False):
        table = Table(title=f"vlm.{layer}.{unit}", title_justify="left", box=box.SIMPLE_HEAD)
        sides = [rows[rows["end"] == end] for end in ("top", "bottom")]
        for name in ("top", "logit", "bottom", "logit"):
            table.add_column(name, justify="right" if name == "logit" else "left")
        for top, bottom in zip(sides[0].itertuples(), sides[1].itertuples(), strict=True):
            cells = [(Text(repr(one.piece)), f"{one.logit:.2f}") for one in (top, bottom)]
            table.add_row(*cells[0], *cells[1])
        console.print(table)


def _print_notes(found: NeuronWords) -> None:
    n_layers = len(found.layers)
    print(
        f"{n_layers * found.n_units} neurons of {n_layers} layers, {found.n_tokens} tokens through "
        f"{found.unembedding}. chance: the cosine of that rank for random words; place: the word's in the "
        "neuron's own list; like: a better-ranked near-duplicate."
    )
    last = found.n_layers - 1
    if not found.last_acts and (found.table["layer"] == last).any():
        print(
            f"Layer {last} is the language model's last: the action expert never sees what its neurons "
            "write, so that firing them changes no action."
        )
