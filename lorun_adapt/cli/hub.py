"""The commands for the Hugging Face Hub: push, pull and list."""

from __future__ import annotations

from pathlib import Path

import click

from .options import FILE, show

REVISION = click.option("--revision", help="Branch, tag or commit of the repository.  [default: main]")


@click.command()
@click.argument("folder", metavar="DIR", type=FILE)
@click.argument("repo", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@REVISION
def push(folder: Path, repo: str, private: bool, revision: str | None) -> None:
    """Upload the converted network in DIR to a repository of the Hub; makes the repository if needed.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from ..hub import transfer

    click.echo(f"uploaded: {transfer.push(folder, repo, private=private or None, revision=revision)}")


@click.command()
@click.argument("repo", metavar="USER/NAME")
@click.option("--out", type=FILE, required=True, help="Folder to save to.")
@REVISION
@click.option("--subfolder", help="Folder of the converted network in the repository.")
def pull(repo: str, out: Path, revision: str | None, subfolder: str | None) -> None:
    """Download a converted network, or adapters only, from a repository of the Hub."""
    from ..hub.repository import Repository
    from ..hub.transfer import pull as download

    download(Repository(repo, revision, subfolder), out)
    click.echo(f"saved to {out}")


@click.command("list")
@click.argument("source", metavar="DIR|USER/NAME")
@REVISION
def list_(source: str, revision: str | None) -> None:
    """Show the adapter sets of a converted network, in a folder or on the Hub."""
    from ..files.layout import ADAPTERS_FOLDER, BASE_FILE
    from ..hub.transfer import list_adapters
    from ..network.noise import is_sigma
    from ..util.numbers import is_whole_number
    from ..util.tables import table
    from ..util.text import shortened

    description, configs = list_adapters(source, revision)
    files = description["files"]
    rows = []
    for name, config in configs.items():
        stages = {file.split("/")[2] for file in files if file.startswith(f"{ADAPTERS_FOLDER}/{name}/stage_")}
        pattern = config.get("rank_pattern")
        all_ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        ranks = sorted({rank for rank in all_ranks if is_whole_number(rank) and rank > 0})
        noise = config.get("noise_schedule")
        sigmas = [sigma for sigma in (noise if isinstance(noise, list) else [noise]) if is_sigma(sigma)]
        noise_text = ", ".join(f"{sigma:g}" for sigma in sigmas)
        rows.append((shortened(name), noise_text, len(stages), ", ".join(map(str, ranks))))
    base = "with its base" if BASE_FILE in files else f"for the base {str(description.get('fingerprint'))[:12]}"
    title = shortened(f"{description.get('network')}, {base}")
    show([table(title, ("adapter set", "sigma, of 255", "stages>", "ranks in its first stage"), rows)])
