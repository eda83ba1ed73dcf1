"""What a run reads: the languages and their samples, in which shares, and what a person should know of it.

Legend: K languages, R rows of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_moo.data.manifest import Manifest
from megatron_moo.data.sampling.batches import Samples, common_samples, open_samples
from megatron_moo.data.sampling.sampler import LanguagePureSampler
from megatron_moo.training.shares import RowWeights, row_weights, run_shares, shares_remarks, shares_table

VALID_SPLITS = ("valid", "validation", "dev")


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        manifest: of the chosen languages alone.
        samples: [K] to train on, after cutting, packing and, with --moo-parallel, choosing those in common.
        validation: [K] to validate on; empty without validation.
        weights: of the rows.
        seed: of the order of languages and samples.
    """

    manifest: Manifest
    samples: list[Samples]
    validation: list[Samples]
    weights: RowWeights
    seed: int

    def samplers(
        self, slots: int, waves: int, active: int | None, floor: float | None
    ) -> tuple[LanguagePureSampler, LanguagePureSampler]:
        """For training, and for validation, where all languages have equal shares."""
        k = len(self.manifest.objectives)
        weights = self.weights
        train = LanguagePureSampler(k, slots, waves, weights.first, self.seed, active, floor=floor, later=weights.later)
        return train, LanguagePureSampler(k, slots, waves, seed=self.seed)

    def identity(self) -> dict[str, Any]:
        """What decides the samples of a step besides the options: kept in a checkpoint, compared on resuming."""
        blend = self.manifest.blend
        phases = [] if blend is None else [dataclasses.asdict(phase) for phase in blend.phases]
        return {
            "moo_data_order": self.seed,
            "moo_data_fingerprint": self.manifest.fingerprint,
            "moo_blend": [[p["from_sample"], p["unit"], sorted(p["weights"].items())] for p in phases],
        }


@functools.cache
def load_manifest(path: Path) -> Manifest:
    """`Manifest.load`, once in a process: it hashes the index files of all languages."""
    return Manifest.load(path)


def chosen_manifest(args: Any) -> Manifest:
    """The manifest, of the languages to train on.

    Raises:
        ValueError: an unknown language, or one without a share in the blend.
    """
    path = args.blend_manifest or args.moo_data
    manifest = load_manifest(path)
    known = list(manifest.languages(args.moo_train_split))
    if manifest.blend is not None:
        known = [lang for lang in known if lang in manifest.objectives]
    chosen = known
    if args.moo_languages is not None:
        chosen = [name.strip() for name in args.moo_languages.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(
            f"--moo-languages: no training data for {', '.join(unknown)} in {path}; known: {', '.join(known)}"
        )
    if not chosen:
        raise ValueError(f"--moo-train-split {args.moo_train_split}: {path} has no language of the blend there")
    return dataclasses.replace(manifest, objectives=tuple(chosen))


def open_run_data(args: Any, manifest: Manifest, row_samples: int) -> RunData:
    """Open the samples and find the weights of the rows.

    Args:
        args: Megatron's arguments with ours.
        manifest: of the chosen languages.
        row_samples: samples of a row.

    Raises:
        ValueError: a language none of whose samples fits, a validation split that lacks one, or too few samples in
            common for parallel batches.
    """
    options = {"seq_length": args.seq_length, "pack": args.moo_pack, "overlong": args.moo_overlong}
    samples = open_samples(manifest, args.moo_train_split, **options)
    split = _validation_split(args, manifest)
    validation = [] if split is None else open_samples(manifest, split, **options)
    if args.moo_parallel:
        samples = common_samples(samples, row_samples)
    weights = row_weights(manifest, args.moo_train_split, samples, args.global_batch_size)
    seed = args.moo_data_seed
    if seed is None:  # the blend's, so that runs with other --seed read the same data
        seed = args.seed if manifest.blend is None else manifest.blend.seed
    return RunData(manifest, samples, validation, weights, seed)


def _validation_split(args: Any, manifest: Manifest) -> str | None:
    """The split to validate on: the one that is asked for, or one of the usual names that holds every language.

    Raises:
        ValueError: the one that is asked for does not.
    """
    why = f"no split is called {', '.join(VALID_SPLITS[:-1])} or {VALID_SPLITS[-1]}; name one with --moo-valid-split"
    for name in [args.moo_valid_split] if args.moo_valid_split else VALID_SPLITS:
        missing = [lang for lang in manifest.objectives if lang not in manifest.splits.get(name, ())]
        if not missing:
            return name
        if args.moo_valid_split:
            raise ValueError(
                f"--moo-valid-split {name}: no such data of {', '.join(missing)} in "
                f"{manifest.folder / manifest.name}; splits: {', '.join(manifest.splits)}"
            )
        if name in manifest.splits:
            why = f"the split {name} lacks {', '.join(missing)}"
    if args.rank == 0 and args.eval_iters:
        print(f" moo: no validation: {why}")
    return None


def print_run_data(args: Any, data: RunData, sampler: LanguagePureSampler) -> None:
    """Shares and epochs, what was too long, how full the packs are, and whom validation does not reach."""
    steps = args.train_iters or -(-(args.train_samples or 0) // args.global_batch_size)
    batch, manifest = args.global_batch_size, data.manifest
    found = run_shares(manifest, args.moo_train_split, data.samples, data.weights, sampler, batch, steps)
    Console(width=120, highlight=False, markup=False).print(shares_table(manifest, data.samples, found, batch, steps))
    for line in shares_remarks(manifest, found, sampler, args.moo_active) if steps else ():
        print(f" moo: {line}")
    languages = manifest.objectives
    for split, samples in ((args.moo_train_split, data.samples), ("validation", data.validation)):
        for lang, found in zip(languages, samples, strict=False):
            if found.fit.dropped or found.fit.truncated or found.fit.split:
                print(f" moo: {split}/{lang}: longer than --seq-length {args.seq_length}: {found.fit}")
    if args.moo_parallel:
        print(f" moo: --moo-parallel: {len(data.samples[0])} ids are in all languages; other samples are not read")
    if args.moo_pack:
        used = ", ".join(
            f"{lang} {found.efficiency:.1%} ({found.samples_per_pack:.1f} samples)"
            for lang, found in zip(languages, data.samples, strict=True)
        )
        print(f" moo: packed sequences, positions used: {used}")
    rows = (args.eval_iters or 0) * sampler.rows
    if data.validation and 0 < rows < len(languages):
        needed = -(-len(languages) // sampler.rows)
        print(
            f" moo: --eval-iters {args.eval_iters} validates {rows} of {len(languages)} languages at a time; "
            f"{needed} reach all"
        )
