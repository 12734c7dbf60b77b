"""The converted network: what runs, how it is trained, where it is kept, and what it amounts to."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..disk.folder import as_path
from ..errors import LoRunError
from ..files import save as checkpoint
from ..files.adapter_info import read_adapter_info
from ..network.assemble import merge
from ..network.batches import Batches
from ..network.converted import AdapterInfo, Quality
from ..network.report import Report, make_report
from ..stages.tensors import base_tensors
from ..training.duration import Duration
from ..util.modules import copy_network
from ..util.seeds import seeded
from .noise_choice import NoiseLevels

if TYPE_CHECKING:
    import os

    from ..training.distill import Loss

DEFAULT_SET = "default"


class LoRunModel(NoiseLevels):
    """A deep unfolding network whose denoisers are one shared base and an adapter per stage.

    Made by :func:`lorun_adapt.convert` and :func:`lorun_adapt.from_pretrained`. It is called with
    the arguments of the original network and returns what that returns. Only adapters train
    (``requires_grad``); the base and what is outside the stages are frozen.

    Attributes:
        base: the bare base, a network of the original class whose stages are all alike.
        adapters: the adapter sets, ``adapters[name]["stage_03"][group]``.
        network: the network that runs. ``set_adapter`` and ``.to`` put a new one in its place,
            so register hooks on it after these.
        stage_map: where the stages are.
        peft_config: the ``LoraConfig`` of each set.
        set_config: what is known of each set beside its tensors: its noise schedule, and its quality.
        card: what the README.md of a saved folder says beside that: licence, task, where the original is.
        trainable: names of the parameters that the network's authors train.
    """

    def merge_and_unload(self) -> nn.Module:
        """A network of the original class with dense weights of its own; this one stays as it is.

        Raises:
            LoRunError: a module that is called in a loop, or has several parents, was trained:
                its stages differ, and the original class has one module for them all.
        """
        network = merge(self.base, self.stage_map, self._choice(self._active), self.outside_that_runs())
        self._apply_schedule(network, self._active)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in self.trainable)
        return network.train(self.training)

    def base_denoiser(self, group: str | None = None) -> nn.Module:
        """The shared denoiser by itself: a module of the original class, with the base's weights.

        It is a copy. PEFT puts a stage's adapter on it, where PEFT can represent the stage:
        ``PeftModel.from_pretrained(lorun.base_denoiser(), "saved/adapters/default/stage_03")``.

        Args:
            group: which denoiser, where a stage has several: a name in ``[g.name for g in lorun.stage_map.groups]``.

        Raises:
            LoRunError: no such group, or none named where there are several.
        """
        groups = {item.name: item for item in self.stage_map.groups}
        if group is None and len(groups) == 1:
            group = next(iter(groups))
        if group not in groups:
            raise LoRunError(f"expected the name of a denoiser among {list(groups)}, found {group!r}: give group=")
        return copy_network(self.base.get_submodule(groups[group].sites[0].module))

    # --- training --------------------------------------------------------------------------------

    def recover(
        self,
        teacher: nn.Module,
        calibration: Iterable[Any],
        *,
        minutes: float | None = None,
        steps: int | None = None,
        loss: Loss | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> bool:
        """Distil the original network into this one, until ``minutes`` or ``steps`` are used up.

        Base, adapters and what is outside the stages train; both networks run in ``eval()``. Progress
        is shown on standard error. The weights that do best on the first two batches are kept; so they
        are after Ctrl-C, and where the loss becomes NaN, from where it goes on with smaller steps.
        Launched with ``accelerate launch``, each process takes batches of its own.

        Args:
            teacher: the network that was converted; it stays as it is.
            calibration: argument tuples of the forward (or tensors, where it takes one), on the networks'
                device or not; over and over if they end. No ground truth is needed.
            loss: where there is ground truth, a callable on output and batch, to minimise instead of the
                distance to the teacher's output. What a batch holds beyond the arguments that the forward
                takes by position is for this alone.
            resume_from: a file to keep the state in, and to go on from where it exists; removed at the end.
            seed: of all random numbers. The same seed and ``steps`` give the same weights on a CPU.

        Returns:
            Whether it ran to its end, and was not stopped by Ctrl-C.

        Raises:
            LoRunError: a calibration that is empty, does not fit the network, or holds NaN alone; another
                teacher; several adapter sets; minutes and steps, or neither.
        """
        from ..training.recovery import recover

        duration = Duration(minutes, steps)
        path = None if resume_from is None else as_path(resume_from)
        with seeded(seed):
            batches = Batches(calibration)
        return recover(self, teacher, batches, duration, loss=loss, resume_from=path, seed=seed)

    def finetune(
        self,
        batches: Iterable[Any],
        adapter_name: str,
        start_from: str | Sequence[str] = DEFAULT_SET,
        *,
        noise_schedule: float | Sequence[float] | None = None,
        also: str | Sequence[str] = (),
        minutes: float | None = None,
        steps: int | None = None,
        loss: Loss | None = None,
        teacher: nn.Module | None = None,
        held_out: Iterable[Any] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> bool:
        """Train a new set, for measurements with other noise, until ``minutes`` or ``steps`` are used up.

        Base, other sets and what is outside the stages stay as they are, to the bit. The new set runs
        meanwhile and afterwards. What does best on batches that are held out is kept, and where nothing has
        got better for long it ends, so that from few images it does not end worse than it began. Progress,
        Ctrl-C, NaN and ``accelerate launch`` are as in :meth:`recover`.

        Args:
            batches: argument tuples of the forward (or tensors, where it takes one), over and over if they end.
                What they hold beyond the arguments that the forward takes by position is for ``loss``.
            adapter_name: a new name.
            start_from: the set that it begins as, or several, between which it begins: where their noise is
                known, and ``noise_schedule`` is one sigma, at that, and else at their mean.
            noise_schedule: the noise that the set is for, by which it is chosen later: the sigma of the
                measurements, or one for each stage, on a scale of 0 to 255. ``schedule`` of :attr:`task` is handed it.
            also: glob patterns of parameters outside the stages that belong to the noise, such as ``"step_sizes"``
                or ``"condition.*"``; the set gets its own of these, which train and travel with it.
            loss: a callable on output and batch, to minimise.
            teacher: a network of the original class to distil instead, or besides.
            held_out: batches to judge by, of images that ``batches`` has not. By default the first two of
                ``batches``, which are not trained on where these are a list of more than three.
            resume_from, seed: as for :meth:`recover`. Where the resume_from is there, a set of that name, which was
                stopped, is gone on with.

        Returns:
            Whether it ran to its end, and was not stopped by Ctrl-C.

        Raises:
            LoRunError: neither loss nor teacher; a name that is taken, an unknown set to start from; patterns that
                match no parameter outside the stages; batches as for :meth:`recover`. There is no new set then, and
                the sets that ran run on.
        """
        from ..training.finetune import finetune, matching

        duration = Duration(minutes, steps)
        path = None if resume_from is None else as_path(resume_from)
        before = self.active_adapters, self._inference_mode
        starts = [start_from] if isinstance(start_from, str) else list(start_from)
        stopped = self._held(adapter_name)
        if stopped is not None and (path is None or not path.exists() or adapter_name in starts):
            raise LoRunError(f"expected a new name for the set, found {adapter_name!r}: choose another, or delete it")
        own = matching(self, [also] if isinstance(also, str) else also)
        try:
            if stopped is not None:  # it begins as it began then, before the resume_from is read
                self.set_adapter(starts[0])
                self.delete_adapter(adapter_name)
            self._begin_set(adapter_name, starts, noise_schedule)
            begun = self._set(adapter_name)
            about = AdapterInfo(self.adapter_info[adapter_name].noise_schedule)
            self._put_set(adapter_name, dataclasses.replace(begun, outside={**own, **begun.outside}, info=about))
            self.set_adapter(adapter_name)
            return finetune(
                self,
                batches,
                adapter_name,
                duration,
                loss=loss,
                teacher=teacher,
                held_out=held_out,
                resume_from=path,
                seed=seed,
            )
        except BaseException:
            if stopped is not None:
                self._run_with(adapter_name, stopped)
            self.set_adapter(*before)
            if stopped is None and adapter_name in self.adapters:
                self.delete_adapter(adapter_name)
            raise

    # --- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, *, adapters_only: bool = False
    ) -> None:
        """Write base and adapters as safetensors and JSON; the folder appears whole or not at all.

        Args:
            path: a new or empty folder, or one saved before, which is replaced.
            dtype: store floating-point tensors as this, for smaller files (``torch.float16``).
            adapters_only: leave out the base, which the adapters then name; :meth:`load_adapter` reads them.

        Raises:
            LoRunError: ``path`` holds something else.
        """
        checkpoint.save(self, as_path(path), dtype, adapters_only)

    def push_to_hub(
        self,
        repo_id: str,
        adapters_only: bool = False,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Save to a repository of the Hub, which is made where there is none.

        Args:
            repo_id: as ``user/name``.
            adapters_only: without the base, which is then to be had elsewhere.
            private: of a new repository: for oneself alone; by default as the account has it.
            revision: a branch, which is made where there is none.
            token: by default the one that ``hf auth login`` has stored, or of ``HF_TOKEN``.
            dtype: store floating-point tensors as this.

        Returns:
            The commit's address.

        Raises:
            LoRunError: no access, no answer, or a repository that holds a base, which ``adapters_only`` would leave
                with adapters of another.
        """
        from ..hub.transfer import push

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "saved")
            self.save_pretrained(folder, dtype, adapters_only=adapters_only)
            return push(folder, repo_id, private=private, revision=revision, token=token)

    # --- figures ---------------------------------------------------------------------------------

    def note_quality(self, measured: Quality) -> None:
        """Note how well the set that runs does, for its card; in the place of what was measured on the same images.

        Raises:
            LoRunError: stages that run with different sets.
        """
        names = set(self._active.values())
        if len(names) > 1:
            raise LoRunError(f"expected one set in all stages, found {sorted(names)}: set the one that was measured")
        name = names.pop()
        about = self.adapter_info[name].with_quality(measured)
        try:
            read_adapter_info(about.as_text().encode(), len(self.stage_map), "")
        except LoRunError:
            raise LoRunError(
                f"expected finite figures of some images, found {measured}: judge the network on others, or look for "
                "NaN in what it restores"
            ) from None
        self.adapter_info[name] = about

    def num_parameters(self) -> int:
        """Parameters of the base and of all sets, every distinct tensor once; :meth:`report` has those that run."""
        held = {id(tensor) for tensor in base_tensors(self.base, self.stage_map).values()}
        held |= {id(parameter) for sets in (self.adapters, self.outside) for parameter in sets.parameters()}
        return sum(parameter.numel() for parameter in self.parameters() if id(parameter) in held)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        total = self.num_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    def report(self) -> Report:
        """Parameters and bytes before and after, and the error of each adapted tensor."""
        return make_report(self)
