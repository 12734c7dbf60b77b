"""The converted network as users hold it."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..disk.folder import as_path
from ..errors import LoRunError
from ..factorise.fresh import untrained_set
from ..files.adapter_info import is_storable
from ..files.layout import INTERPOLATED
from ..files.save import save
from ..files.sets import SetReader, check_stage
from ..hub.source import files_of_set, resolve_source
from ..network.adapter import StageAdapter
from ..network.assemble import assemble, merge
from ..network.batches import Batches
from ..network.converted import AdapterSet, Choice, Converted, Quality
from ..network.noise import Noise, noise_of
from ..network.report import Report, make_report
from ..network.sharing import share_again, shared_places
from ..stages.stage_map import Group, Site
from ..stages.tensors import base_tensors
from ..training.duration import Duration
from ..util.fingerprint import fingerprint_of
from ..util.modules import copy_network, distinct_tensors
from ..util.seeds import seeded
from .combine import weighted_outside, weighted_set
from .noise_choice import NoiseChoice
from .running import Running
from .selection import selected
from .set_store import SetStore, check_adapter_name
from .state_dict import Loading, register_hooks

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

    from ..training.distill import Loss

DEFAULT_SET = "default"


class LoRunModel(nn.Module):
    """A deep unfolding network whose denoisers are one shared base and an adapter per stage.

    Made by :func:`lorun_adapt.convert` and :func:`lorun_adapt.from_pretrained`. Call it with the arguments of the
    original network; it returns what that returns. Only the adapters that run are trainable (``requires_grad``): the
    base and what is outside the stages are frozen. Attributes of the original network are reachable, as in PEFT.

    Attributes:
        base: the bare base, a network of the original class whose stages are all alike.
        adapters: the adapter sets, ``adapters[name]["stage_03"][group]``.
        outside: for each set that has some, its own parameters outside the stages.
        network: the network that runs. ``set_adapter`` and ``.to`` replace it, so register hooks on it afterwards.
        stage_map: where the stages are.
        peft_config: the ``LoraConfig`` of each set.
        adapter_info: what is known of each set beside its tensors: its noise and its quality.
        residuals: by group and tensor, for each stage: the norm that the conversion lost, and the tensor's norm.
        card: what the README.md of a saved folder says beside figures: licence, task, where the original is.
        trainable_names: names of the parameters that the network's authors train.
    """

    base: nn.Module
    adapters: nn.ModuleDict
    outside: nn.ModuleDict
    network: nn.Module

    def __init__(self, converted: Converted) -> None:
        super().__init__()
        converted.base.requires_grad_(False)
        self.base = converted.base
        self._store = SetStore(converted.trainable_names)
        self.adapters, self.outside = self._store.adapters, self._store.outside
        self.peft_config, self.adapter_info = self._store.configs, self._store.infos
        self.stage_map = converted.stage_map
        self.residuals = {group: dict(tensors) for group, tensors in converted.residuals.items()}
        self.trainable_names = converted.trainable_names
        self.card = converted.card
        self.loading: Loading | None = None
        self._running = Running(len(converted.stage_map))
        self._noise = NoiseChoice()
        self._swapping = threading.RLock()
        self._reader: SetReader | None = None
        self._fingerprint = converted.known_fingerprint
        self._base_parameters = list(self.base.parameters())  # which take long to list
        self.network = self.base
        for name, held in converted.sets.items():
            self._put(name, held)
        self.training = self.base.training
        register_hooks(self)
        self.set_adapter(converted.active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original network returns for the same arguments."""
        return self._modules["network"](*args, **kwargs)  # type: ignore[misc]

    def converted(self) -> Converted:
        """This network as plain data, around the same tensors."""
        sets = {name: self._store.get(name) for name in self._store}
        return Converted(
            self.base,
            self.stage_map,
            sets,
            self._running.active,
            self.residuals,
            self.trainable_names,
            self.card,
            self.fingerprint,
        )

    @property
    def fingerprint(self) -> str:
        """What names the base in files: it stays when the base is stored in, or moved to, another dtype."""
        if self._fingerprint is None or any(parameter.requires_grad for parameter in self._base_parameters):
            self._fingerprint = fingerprint_of(distinct_tensors(self.base))
            self._reader = None
        return self._fingerprint

    # --- adapters --------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The adapter sets that are loaded."""
        return self._store.names

    @property
    def active_adapters(self) -> list[str] | dict[int, str]:
        """The set that runs, in a list as in PEFT; where stages run with different sets, the set of each stage."""
        everywhere = self._running.everywhere
        return dict(self._running.active) if everywhere is None else [everywhere]

    def set_adapter(self, adapter: str | Sequence[str] | Mapping[int, str], inference_mode: bool = False) -> None:
        """Run with another set in all stages, or, with ``{stage: name}``, in some.

        Forwards may run meanwhile in other threads: each runs with the sets it began with, or with the new ones.
        A set's own parameters outside the stages run where all stages run with that set.

        Args:
            adapter: the name of a set (a list of one is allowed, as in PEFT), or names by stage.
            inference_mode: freeze the sets that run, too. Otherwise they train, as in PEFT, and a network that is
                compiled for sets that train is compiled again for frozen ones.

        Raises:
            LoRunError: an unknown set or stage, or a set without the stage; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "mine")
        >>> lorun.set_adapter({0: "mine"})
        >>> lorun.active_adapters
        {0: 'mine', 1: 'default', 2: 'default'}
        """
        with self._swapping:
            wanted = self._running.wanted(adapter)
            for stage, name in wanted.items():
                self._store.check_known(name)
                _check_holds(name, stage, self._store.stages(name))
            network = self._network_for(wanted)
            before = self._running.names
            self._running.active, self._running.inference_mode, self.network = wanted, inference_mode, network
            self._set_trainable({*before, *wanted.values()})

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the bare base in every stage within the ``with`` block."""
        with self._swapping:
            before, self.network = self.network, self.base
        try:
            yield
        finally:
            if before is not self.base:  # else within another `with`
                with self._swapping:
                    self.network = self._network_for(self._running.active)

    def load_adapter(
        self,
        source: str | os.PathLike[str],
        adapter_name: str,
        stage: int | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a set, or one stage's adapter, under a name. :meth:`set_adapter` runs it.

        Args:
            source: a saved folder (its set of that name, or its only one), the folder of a set, or, with ``stage``,
                the folder of a single stage or its safetensors file beside its ``adapter_config.json``; or a
                repository of the Hub, as ``user/name``, of which only the files needed are downloaded.
            adapter_name: letters, digits, ``_`` and ``-``. A loaded set of that name is replaced;
                with ``stage`` only that stage is.
            stage: load this stage's adapter alone.
            revision, subfolder, token, cache_dir, local_files_only: of the repository, as
                ``huggingface_hub.hf_hub_download`` takes them.

        Raises:
            LoRunError: files that are missing, damaged or not for this base; nothing changes then.
        """
        check_adapter_name(adapter_name)
        check_stage(stage, len(self.stage_map))
        path = resolve_source(
            source,
            files_of_set(self.stage_map, adapter_name, stage),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        fingerprint = self.fingerprint
        reader = self._reader = self._reader or SetReader(self.base, self.stage_map, fingerprint)
        held = reader.load(path, adapter_name, stage)
        with self._swapping:
            if stage is not None and adapter_name in self._store:
                before = self._store.get(adapter_name)
                info = dataclasses.replace(before.info, quality=())
                adapters = {**before.adapters, **held.adapters}
                held = dataclasses.replace(before, adapters=adapters, config=held.config, info=info)
            self._put(adapter_name, held)

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Add an untrained set, as in PEFT: it adds nothing to the base until it is trained.

        Args:
            adapter_name: a new name.
            config: which tensors are adapted, and at what rank; names are relative to the denoiser.

        Raises:
            LoRunError: a name that is taken; what :func:`lorun_adapt.convert` refuses of a config.

        >>> import lorun_adapt
        >>> from peft import LoraConfig
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.add_adapter("new", LoraConfig(r=2))
        >>> lorun.adapter_names
        ['default', 'new']
        """
        self._check_new(adapter_name)
        with self._swapping:
            self._put(adapter_name, untrained_set(self.base, self.stage_map, config))

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Make a set of the weighted sum of what others add to the base, as PEFT does with ``combination_type="svd"``.

        A tensor's low-rank terms become one of the largest of their ranks, by SVD of their sum. Of the stages' private
        tensors, the differences from the base are summed. Weights that sum to 1 interpolate. The new set has the
        stages that all of the others have.

        Args:
            adapters, weights: names of loaded sets, and a number for each, which may be negative.
            adapter_name: the new set's name; a set of that name is replaced.

        Raises:
            LoRunError: an unknown set, lists of different lengths, or sums that are not finite; nothing changes then.
        """
        check_adapter_name(adapter_name)
        with self._swapping:
            self._put(adapter_name, self._weighted(adapters, weights))

    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Make a set that starts as a copy of another.

        Raises:
            LoRunError: an unknown set, or a name that is taken; nothing changes then.
        """
        with self._swapping:
            self._store.check_known(source)
            self._check_new(adapter_name)
            self._put(adapter_name, copy.deepcopy(self._store.get(source)))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a set that no stage runs with.

        Raises:
            LoRunError: an unknown set, or one in use.
        """
        with self._swapping:
            self._store.check_known(adapter_name)
            if adapter_name in self._running.names:
                raise LoRunError(f"the set {adapter_name!r} is running and cannot be deleted: set another one first")
            self._running.forget(adapter_name)
            self._store.drop(adapter_name)

    def adapter_of(self, group: Group, site: Site, adapter_name: str | None = None) -> StageAdapter:
        """The adapter of one denoiser.

        Args:
            group, site: one of ``lorun.stage_map.groups``, and of its ``sites``.
            adapter_name: of which set; by default of the one that the stage runs with.
        """
        name = self._running.active[site.stage] if adapter_name is None else adapter_name
        self._store.check_known(name)
        return self._store.adapters_at(name, site.stage)[group.name]

    def outside_of(self, adapter_name: str) -> Mapping[str, Tensor]:
        """The parameters outside the stages that a set brings with it, by name."""
        return self._store.get(adapter_name).outside

    # --- noise -----------------------------------------------------------------------------------

    @property
    def task(self) -> Any:
        """What knows of the measurements: a task, or anything else with its functions ``schedule`` and ``noise_level``.

        Either may be missing. ``schedule(net, sigmas)`` tells a network the noise schedule of the sets that it runs
        with, one sigma for each stage. ``noise_level(args)`` estimates sigma from the arguments of a forward. Both are
        on a scale of 0 to 255.
        """
        return self._noise.task

    @task.setter
    def task(self, task: Any) -> None:
        with self._swapping:
            before, self._noise.task = self._noise.task, task
            try:
                self._assemble_again()
            except BaseException:
                self._noise.task = before
                raise

    def set_noise(
        self, adapter_name: str, *, sigma: float | None = None, noise_schedule: Sequence[float] | None = None
    ) -> None:
        """Say which noise a set is for; with neither, that it is not known.

        Args:
            sigma: the noise of the measurements, on a scale of 0 to 255.
            noise_schedule: instead of it, one sigma for each stage.

        Raises:
            LoRunError: an unknown set, negative numbers, or not as many as there are stages; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.set_noise("default", sigma=25)
        >>> lorun.adapter_info["default"].sigma
        25.0
        """
        with self._swapping:
            self._store.check_known(adapter_name)
            self._set_noise(adapter_name, noise_of(sigma, noise_schedule, len(self.stage_map)))

    @contextmanager
    def assume_noise(self, sigma: float) -> Iterator[None]:
        """Within the ``with`` block, take sets that run, and whose noise is not known, to be for ``sigma``."""
        unknown = [name for name in self._running.names if self.adapter_info[name].noise is None]
        for name in unknown:
            self.set_noise(name, sigma=sigma)
        try:
            yield
        finally:
            for name in unknown:
                self.set_noise(name)

    def select_adapter(self, sigma: float | str, *arguments: Any) -> str:
        """Run with the set for a noise level: the one for it, or what is between the two around it, or the nearest.

        What is between two sets is their weighted sum, a set with the reserved name ``interpolated``. The next one
        replaces it, and it is never saved.

        Args:
            sigma: noise on the measurements, on a scale of 0 to 255; or ``"auto"``: what ``noise_level`` of the task
                estimates from the arguments of a forward.
            arguments: these, with ``"auto"``.

        Returns:
            The set's name.

        Raises:
            LoRunError: no set with a known sigma, see :meth:`set_noise`; ``"auto"`` without a task that estimates it,
                or without arguments; no sigma of 0 or more. Nothing changes then.
        """
        sigma = self._noise.estimate(sigma, arguments)
        with self._swapping:
            name, made = self._closest(sigma)
            try:
                self.set_adapter(name, self._running.inference_mode)
            except BaseException:
                if made:
                    self.delete_adapter(name)
                raise
            return name

    def weights_for(self, sigma: float, among: Iterable[str] | None = None) -> dict[str, float]:
        """How much of which set stands for a noise level.

        Args:
            sigma: on a scale of 0 to 255.
            among: sets to choose from; by default all.

        Raises:
            LoRunError: no set with a known sigma.
        """
        infos = {name: info for name, info in self.adapter_info.items() if name != INTERPOLATED}
        return self._noise.weights(sigma, infos, among)

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
        """Distil the original network into this one, for so many minutes or steps.

        Base, adapters and what is outside the stages train; both networks run in ``eval()``. Progress is shown on
        standard error. The weights that do best on the first two batches are kept, also after Ctrl-C. Where the loss
        becomes NaN, training goes back to them and takes smaller steps. Launched with ``accelerate launch``, each
        process takes batches of its own.

        Args:
            teacher: the network that was converted; it stays as it is.
            calibration: argument tuples of the forward (or tensors, where it takes one), on the networks'
                device or not; repeated if they end. No ground truth is needed.
            minutes, steps: how long to train; give one.
            loss: where there is ground truth, a callable on output and batch, to minimise instead of the
                distance to the teacher's output. What a batch holds beyond the arguments that the forward
                takes by position is for the loss alone.
            resume_from: a state file: keeps the state of the run, and the run resumes from it if it exists. It is
                removed at the end.
            seed: of all random numbers. The same seed and ``steps`` give the same weights on a CPU.

        Returns:
            Whether it ran to its end, and was not stopped by Ctrl-C.

        Raises:
            LoRunError: a calibration that is empty, does not fit the network, or holds NaN alone; another
                teacher; several adapter sets; minutes and steps, or neither.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> net = ToyUnfoldingNet()
        >>> lorun = lorun_adapt.convert(net, rank=1)
        >>> lorun.recover(net, [torch.rand(2, 1, 8, 8)], steps=1)
        True
        """
        from ..training.recovery import recover  # training needs libraries that running does not

        duration = Duration(minutes, steps)
        path = None if resume_from is None else as_path(resume_from)
        with seeded(seed):
            batches = Batches(calibration)
        before = self._hashes()
        try:
            return recover(self.converted(), self.network, teacher, batches, duration, loss, path, seed)
        finally:
            self._forget_what_changed(before)

    def finetune(
        self,
        batches: Iterable[Any],
        adapter_name: str,
        start_from: str | Sequence[str] = DEFAULT_SET,
        *,
        sigma: float | None = None,
        noise_schedule: Sequence[float] | None = None,
        also: str | Sequence[str] = (),
        minutes: float | None = None,
        steps: int | None = None,
        loss: Loss | None = None,
        teacher: nn.Module | None = None,
        held_out: Iterable[Any] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> bool:
        """Train a new set, for measurements with other noise, for so many minutes or steps.

        Base, other sets and what is outside the stages stay as they are, to the bit. The new set runs meanwhile and
        afterwards. The weights that do best on held-out batches are kept, and training ends early when nothing has
        improved for long, so that a set trained on few images does not end worse than it began. Progress, Ctrl-C, NaN
        and ``accelerate launch`` are as in :meth:`recover`.

        Args:
            batches: argument tuples of the forward (or tensors, where it takes one), repeated if they end.
                What they hold beyond the arguments that the forward takes by position is for ``loss``.
            adapter_name: a new name.
            start_from: the set that it starts as, or several, between which it starts: at ``sigma`` where their noise
                is known, and else at their mean.
            sigma: the noise of the measurements that the set is for, on a scale of 0 to 255; it is chosen by it later.
            noise_schedule: instead of it, one sigma for each stage. ``schedule`` of :attr:`task` gets these.
            also: glob patterns of parameters outside the stages that belong to the noise, such as ``"step_sizes"``
                or ``"condition.*"``; the set gets its own of these, which train and travel with it.
            minutes, steps: how long to train; give one.
            loss: a callable on output and batch, to minimise.
            teacher: a network of the original class to distil instead, or besides.
            held_out: batches to judge by, of images that are not in ``batches``. By default the first two of
                ``batches``, which are not trained on where these are a list of more than three.
            resume_from, seed: as for :meth:`recover`. If the state file exists, a set of that name, whose training
                was stopped, is trained further.

        Returns:
            Whether it ran to its end, and was not stopped by Ctrl-C.

        Raises:
            LoRunError: neither loss nor teacher; a name that is taken, an unknown set to start from; patterns that
                match no parameter outside the stages; batches as for :meth:`recover`. There is no new set then, and
                the sets that ran still run.
        """
        from ..training.finetune import finetune, matching

        duration = Duration(minutes, steps)
        path = None if resume_from is None else as_path(resume_from)
        before = self._running.active, self._running.inference_mode
        starts = [start_from] if isinstance(start_from, str) else list(start_from)
        stopped = self._store.get(adapter_name) if adapter_name in self._store else None
        if stopped is None or path is None or not path.exists() or adapter_name in starts:
            self._check_new(adapter_name)
        own = matching(self.base, self.stage_map, [also] if isinstance(also, str) else also)
        noise = noise_of(sigma, noise_schedule, len(self.stage_map))
        try:
            if stopped is not None:  # it starts as it did then, before the state file is read
                self.set_adapter(starts[0])
                self.delete_adapter(adapter_name)
            begun = self._start_of(starts, noise)
            outside = {**own, **begun.outside}
            self._put(adapter_name, dataclasses.replace(begun, outside=outside, info=begun.info.with_noise(noise)))
            self.set_adapter(adapter_name)
            return finetune(
                self.converted(),
                self.network,
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
                self._put(adapter_name, stopped)
            self.set_adapter(*before)
            if stopped is None and adapter_name in self._store:
                self.delete_adapter(adapter_name)
            raise

    # --- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        adapters_only: bool = False,
        selected_adapters: Sequence[str] | None = None,
    ) -> None:
        """Write base and adapters as safetensors and JSON; the folder appears whole or not at all.

        Args:
            path: a new or empty folder, or one saved before, which is replaced.
            dtype: store floating-point tensors as this, for smaller files (``torch.float16``).
            adapters_only: leave out the base, which the adapters then name; :meth:`load_adapter` reads them.
            selected_adapters: the sets to save; by default all but an interpolated one.

        Raises:
            LoRunError: ``path`` holds something else; an unknown set, or sets that lack a stage.

        >>> import lorun_adapt, tempfile
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lorun.save_pretrained(folder + "/saved")
        ...     again = lorun_adapt.from_pretrained(folder + "/saved", ToyUnfoldingNet())
        >>> again.adapter_names
        ['default']
        """
        save(selected(self.converted(), selected_adapters), as_path(path), dtype, adapters_only)

    def push_to_hub(
        self,
        repo_id: str,
        adapters_only: bool = False,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Save to a repository of the Hub, which is created if it does not exist.

        Args:
            repo_id: as ``user/name``.
            adapters_only: without the base, which must then be available elsewhere.
            private: whether a new repository is private; by default as the account has it.
            revision: a branch, which is created if it does not exist.
            token: by default the one that ``hf auth login`` has stored, or that of ``HF_TOKEN``.
            dtype: store floating-point tensors as this.
            commit_message: by default one that names the sets.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit's address.

        Raises:
            LoRunError: no access, no answer, or, with ``adapters_only``, a repository that holds a base.
        """
        from ..hub.transfer import push

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "saved")
            self.save_pretrained(folder, dtype, adapters_only=adapters_only)
            return push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """A network of the original class with dense weights of its own; this one stays as it is.

        Args:
            safe_merge: refuse a result with NaN or Inf.
            adapter_names: merge these sets instead of those that run. What several add to the base is summed.

        Raises:
            LoRunError: a module that is called in a loop, or has several parents, was trained: its stages differ, and
                the original class has one module for them all. An unknown set, or one that lacks a stage.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> type(lorun_adapt.convert(ToyUnfoldingNet(), rank=1).merge_and_unload()).__name__
        'ToyUnfoldingNet'
        """
        outside: Mapping[str, Tensor]
        if adapter_names is None:
            active, outside = self._running.active, self._outside_of(self._running.active)
            choices = [self._choice(active)]
        else:
            names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
            wanted = [self._running.wanted(name) for name in names]
            for stage, name in [item for active in wanted for item in active.items()]:
                self._store.check_known(name)
                _check_holds(name, stage, self._store.stages(name))
            if not wanted:
                raise LoRunError("no adapter set to merge: name one in adapter_names")
            choices, active = [self._choice(active) for active in wanted], wanted[0]
            outsides = [self._store.get(name).outside for name in names]
            outside = weighted_outside(self.base, self.stage_map, outsides, [1.0] * len(names))
        network = merge(self.base, self.stage_map, choices, outside)
        self._prepare(network, active)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in self.trainable_names)
        if safe_merge:
            for name, tensor in distinct_tensors(network).items():
                if not bool(torch.isfinite(tensor).all()):
                    raise LoRunError(f"the merged {name!r} holds NaN or Inf: merge sets from before training diverged")
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

    # --- figures ---------------------------------------------------------------------------------

    def note_quality(self, quality: Quality) -> None:
        """Note how well the set that runs does, for its card; this replaces what was measured on the same images.

        Raises:
            LoRunError: stages that run with different sets, or figures that are not finite.
        """
        name = self._running.everywhere
        if name is None:
            raise LoRunError(f"stages run with different sets, {sorted(self._running.names)}: set the one measured")
        if not is_storable(quality):
            raise LoRunError(
                f"expected finite figures of some images, found {quality}: judge the network on others, or look for "
                "NaN in what it restores"
            )
        self.adapter_info[name] = self.adapter_info[name].with_quality(quality)

    def report(self) -> Report:
        """Parameters and bytes before and after, and the residual of each adapted tensor."""
        return make_report(self.converted())

    def num_parameters(self) -> int:
        """Parameters of the base and of all sets, every distinct tensor once; :meth:`report` counts those that run."""
        held = {id(tensor) for tensor in base_tensors(self.base, self.stage_map).values()}
        held |= {id(parameter) for sets in (self.adapters, self.outside) for parameter in sets.parameters()}
        return sum(parameter.numel() for parameter in self.parameters() if id(parameter) in held)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are, as in PEFT."""
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trainable, self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    # --- torch -----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original network, as far as it has others."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("network")
            if network is None or not hasattr(network, name):
                raise
            return getattr(network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "task":  # past nn.Module.__setattr__: a module is not to be trained, moved or saved
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Buffers, and under some of torch's settings parameters too, are replaced place by place,
        # which would leave each place with a tensor of its own.
        _ = self.fingerprint  # of the base as it was before a change of dtype
        shared = shared_places(self.base, self.adapters)
        super()._apply(fn, recurse)
        share_again(shared)
        self._assemble_again()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = self.__new__(type(self))
        memo[id(self)] = result
        memo[id(self._swapping)] = threading.RLock()  # a lock can't be copied
        result.__dict__ = copy.deepcopy({**self.__dict__, "_reader": None}, memo)
        return result

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LoRunError(
            "a LoRunModel is never pickled (torch.save, pickle, a spawned process): use save_pretrained, or torch.save "
            "its state_dict()"
        )

    # --- within ----------------------------------------------------------------------------------

    def replace_tensors(self, base_changed: bool) -> None:
        """Put the network together again around tensors that :meth:`load_state_dict` has replaced."""
        if base_changed:
            self._fingerprint = None
        self._assemble_again()

    def _assemble_again(self) -> None:
        self._base_parameters = list(self.base.parameters())
        self._running.clear()
        self._reader = None
        if self.network is not self.base:
            self.network = self._network_for(self._running.active)

    def _network_for(self, active: Mapping[int, str]) -> nn.Module:
        """The network of a choice of sets, its modules in the modes of those that run now."""
        return self._running.network(active, lambda: self._assembled(active), self.network, self.training)

    def _assembled(self, active: Mapping[int, str]) -> nn.Module:
        network = assemble(self.base, self.stage_map, self._choice(active), self._outside_of(active))
        self._prepare(network, active)
        return network

    def _prepare(self, network: nn.Module, active: Mapping[int, str]) -> None:
        """Tell a network the noise that its sets are for."""
        self._noise.prepare(network, [self.adapter_info[active[stage]].noise for stage in range(len(self.stage_map))])

    def _choice(self, active: Mapping[int, str]) -> Choice:
        return {stage: self._store.adapters_at(name, stage) for stage, name in active.items()}

    def _outside_of(self, active: Mapping[int, str]) -> Mapping[str, Tensor]:
        """The parameters outside the stages that replace the base's: those of a set that runs in every stage."""
        names = set(active.values())
        return self._store.get(names.pop()).outside if len(names) == 1 else {}

    def _put(self, name: str, held: AdapterSet) -> None:
        """Hold a set under a name, in place of one that has it; if that one runs, run the new one."""
        for stage, active in self._running.active.items():
            if active == name:
                _check_holds(name, stage, held.adapters)
        before = self._store.get(name) if name in self._store else None
        self._store.put(name, held)
        self._running.forget(name)
        if name in self._running.names and self.network is not self.base:
            try:
                self.network = self._network_for(self._running.active)
            except BaseException:
                self._store.drop(name) if before is None else self._store.put(name, before)
                raise
        self._set_trainable([name])

    def _set_trainable(self, names: Iterable[str]) -> None:
        """Make only the active sets' adapters trainable (none in inference mode)."""
        running, frozen = self._running, self._running.inference_mode
        for name in set(names):
            stages = [] if frozen else [stage for stage, active in running.active.items() if active == name]
            self._store.set_trainable(name, stages, outside=not frozen and running.everywhere == name)

    def _check_new(self, name: str) -> None:
        check_adapter_name(name)
        if name in self._store:
            raise LoRunError(f"there is a set {name!r} already: choose another name, or delete it")

    def _set_noise(self, name: str, noise: Noise | None) -> None:
        held = self._store.get(name)
        self._put(name, dataclasses.replace(held, info=held.info.with_noise(noise)))

    def _weighted(self, names: Sequence[str], weights: Sequence[float]) -> AdapterSet:
        if isinstance(names, str) or len(names) == 0 or len(names) != len(weights):
            raise LoRunError(
                f"expected as many weights as adapters, found {weights!r} for {names!r}: give two lists of one length"
            )
        return weighted_set(self.base, self.stage_map, [self._store.get(name) for name in names], weights)

    def _closest(self, sigma: float) -> tuple[str, bool]:
        """The set for a noise level, and whether it was made just now."""
        weights = self.weights_for(sigma)
        if len(weights) == 1:
            name = next(iter(weights))
            if (known := self.adapter_info[name].sigma) != sigma:
                warnings.warn(
                    f"no set is for a sigma of {sigma:g}: taking the nearest, {name}, which is for {known:g}",
                    stacklevel=3,
                )
            return name, False
        sets = [held[name] for name in weights for held in (self.adapters, self.outside) if name in held]
        made_of, tensors = (sigma, weights), [tensor for held in sets for tensor in held.parameters()]
        known_set = INTERPOLATED in self._store
        if not known_set or not self._noise.is_interpolated(made_of, tensors):
            held = self._weighted(list(weights), list(weights.values()))
            self._put(INTERPOLATED, dataclasses.replace(held, info=held.info.with_noise(sigma)))
            self._noise.note_interpolated(made_of, tensors)
        return INTERPOLATED, not known_set

    def _start_of(self, names: Sequence[str], noise: Noise | None) -> AdapterSet:
        """A set that starts as another, or between several."""
        for name in names:
            self._store.check_known(name)
        if len(set(names)) < len(names):
            raise LoRunError(f"a set stands twice in {list(names)}: name each set to start from once")
        weights = dict.fromkeys(names, 1 / max(len(names), 1))
        if names and isinstance(noise, float) and all(self.adapter_info[name].sigma is not None for name in names):
            weights = self.weights_for(noise, names)
        if len(weights) == 1:
            held = copy.deepcopy(self._store.get(next(iter(weights))))
        else:
            held = self._weighted(list(weights), list(weights.values()))
        return dataclasses.replace(held, info=dataclasses.replace(held.info, quality=()))

    def _hashes(self) -> tuple[str, str]:
        """Hashes of the base as it is in memory, and of all tensors: base, adapters and what sets have outside."""
        return fingerprint_of(distinct_tensors(self.base)), fingerprint_of(self.state_dict())

    def _forget_what_changed(self, before: tuple[str, str]) -> None:
        """Drop the base's fingerprint, and what was measured, where training has changed what they are of."""
        now = self._hashes()
        if now[0] != before[0]:
            self._fingerprint = None
        if now != before:
            for name, info in self.adapter_info.items():
                self.adapter_info[name] = dataclasses.replace(info, quality=())


def _check_holds(name: str, stage: int, stages: Collection[int]) -> None:
    if stage not in stages:
        raise LoRunError(
            f"the set {name!r} has no adapter for stage {stage}, only for {list(stages)}: name the stages that it is for, "
            "as {stage: name}"
        )
