"""The converted network: the object that users run, train, save and share."""

from __future__ import annotations

import contextlib
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
from ..factorise.plan import plan
from ..files.adapter_info import is_storable
from ..files.layout import INTERPOLATED
from ..files.save import save
from ..files.sets import SetReader, check_stage
from ..hub.source import files_of_set, resolve_source
from ..network.adapted import merge_terms, merged_tensors
from ..network.adapter import StageAdapter
from ..network.assemble import assemble, merge
from ..network.batches import Batches
from ..network.composed import composing_once
from ..network.converted import AdapterSet, Choice, Converted, Quality, ranks_in
from ..network.dense import check_merged
from ..network.eight_bits import copied_in_floats, in_eight_bits, in_floats
from ..network.noise import Noise, noise_of
from ..network.report import Report, make_report
from ..network.sharing import share_again, shared_places, tie_again
from ..stages.stage_map import Group, Site
from ..stages.tensors import base_denoiser, base_tensors
from ..training.duration import Duration
from ..util.copying import deep_copy
from ..util.fingerprint import fingerprint_of, versions_of
from ..util.modules import distinct_tensors, tensors_in_state
from ..util.numbers import is_index
from ..util.seeds import seeded
from ..util.torch_modes import in_own_modes
from .combine import check_values, weighted_outside, weighted_set
from .noise_choice import NoiseChoice
from .ready import take_modes
from .running import Running
from .selection import select_sets
from .set_store import SetStore, check_adapter_name
from .state_dict import Loading, register_hooks

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

    from ..training.distill import Loss

DEFAULT_SET = "default"


class LoRunModel(nn.Module):
    """A deep unfolding network whose denoisers are one shared base and an adapter per stage.

    :func:`lorun_adapt.convert` and :func:`lorun_adapt.from_pretrained` return one. Call it with the arguments of the
    original network; it returns what the original returns. Only the active adapters are trainable
    (``requires_grad``); the base and the parameters outside the stages are frozen. The attributes of the original
    network are available on this object, as in PEFT.

    Attributes:
        base: the base without adapters: a network of the original class whose stages are identical, unless
            ``stage_map.shared`` is False.
        adapters: the adapter sets, ``adapters[name]["stage_03"][group]``.
        outside: the parameters outside the stages that a set replaces, for each set that replaces some.
        network: the network that runs. ``set_adapter`` and ``.to`` replace it, so register hooks on it afterwards.
        stage_map: the positions of the stages in the network.
        peft_config: the ``LoraConfig`` of each set.
        adapter_info: the noise level and the measured quality of each set.
        residuals: by group and tensor, a pair for each stage: the norm of the difference between the original tensor
            and its replacement at conversion, and the norm of the original tensor.
        card: the text of the model card: licence, task, and the original's repository.
        trainable_names: names of the parameters that the original network trains.

    >>> import lorun_adapt, torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
    >>> lorun(torch.rand(1, 1, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    >>> lorun.adapter_names, lorun.active_adapters
    (['default'], ['default'])
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
        self._ties = converted.ties
        self._recovered = converted.recovered
        self.loading: Loading | None = None
        self._running = Running(len(converted.stage_map))
        self._beyond = "error"
        self._disabled = 0  # blocks of disable_adapter that are open
        self._noise = NoiseChoice()
        self._lock = threading.RLock()
        self._reader: SetReader | None = None
        self._fingerprint = converted.known_fingerprint
        self._rounded: dict[str, str] = {}  # the base's fingerprint before int8(), by that of what it was rounded to
        self._base_tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._note_base()
        self.network = self.base
        for name, held in converted.sets.items():
            self._put(name, held)
        self.training = self.base.training
        register_hooks(self)
        self.set_adapter(converted.active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the active adapters; it takes and returns what the original network does."""
        network = self._modules["network"]
        if torch.compiler.is_compiling():
            return network(*args, **kwargs)  # type: ignore[misc]
        with composing_once():
            return network(*args, **kwargs)  # type: ignore[misc]

    def converted(self) -> Converted:
        """Return this network as plain data; the tensors are shared, not copied."""
        sets = {name: self._store.get(name) for name in self._store}
        return Converted(
            self.base,
            self.stage_map,
            sets,
            self._running.active,
            self.residuals,
            self.trainable_names,
            self.card,
            self._ties,
            self.fingerprint,
            self._recovered,
        )

    @property
    def fingerprint(self) -> str:
        """The hash that identifies the base in files; converting the base to another dtype does not change it."""
        versions = versions_of(self._base_tensors)
        trains = any(tensor.requires_grad for tensor in self._base_tensors)
        if self._fingerprint is None or trains or versions != self._versions:
            found = fingerprint_of(distinct_tensors(self.base))
            self._fingerprint, self._versions = self._rounded.get(found, found), versions
            self._reader = None
        return self._fingerprint

    @property
    def beyond(self) -> str:
        """What runs if a looped module is called more often than there are stages: ``"error"``, or ``"last"`` stage.

        Set it to ``"last"`` for networks that iterate until they converge. It is not saved.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun_adapt.convert(ToyUnfoldingNet(), rank=1).beyond
        'error'
        """
        return self._beyond

    @beyond.setter
    def beyond(self, value: str) -> None:
        if value not in ("error", "last"):
            raise LoRunError(f"expected 'error' or 'last' for beyond, found {value!r}: choose one of them")
        if value == "last" and all(site.call is None for site in self.stage_map.sites):
            raise LoRunError(f"no stage of {self.stage_map.network} is called in a loop: leave beyond as it is")
        with self._lock:
            before, self._beyond = self._beyond, value
            try:
                self._assemble_again()
            except BaseException:
                self._beyond = before
                raise

    # --- adapters --------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """The names of the loaded adapter sets."""
        return self._store.names

    @property
    def active_adapters(self) -> list[str] | dict[int, str]:
        """The active set in a list, as in PEFT, or ``{stage: name}`` if the stages run different sets."""
        common = self._running.common_set
        return dict(self._running.active) if common is None else [common]

    @in_own_modes
    def set_adapter(self, adapter: str | Sequence[str] | Mapping[int, str], inference_mode: bool = False) -> None:
        """Activate a set in all stages, or, with ``{stage: name}``, in some of them.

        Other threads may run forwards at the same time: each forward uses either the old or the new sets throughout.
        A set's parameters outside the stages apply only if all stages run that set.

        Args:
            adapter: the name of a set (or a list of one name, as in PEFT), or ``{stage: name}``, with stages counted
                from 0.
            inference_mode: freeze the active sets as well. By default they are trainable, as in PEFT.
                ``torch.compile`` compiles once for trainable and once for frozen sets.

        Raises:
            LoRunError: an unknown set or stage, or a set without an adapter for the stage; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "mine")
        >>> lorun.set_adapter({0: "mine"})
        >>> lorun.active_adapters
        {0: 'mine', 1: 'default', 2: 'default'}
        """
        with self._lock:
            active = self._running.resolve(adapter)
            self._check_active(active)
            network = self._network_for(active)
            before = self._running.names
            self._running.active, self._running.inference_mode, self._running.merged = active, inference_mode, False
            if not self._disabled:
                self.network = network
            self._set_trainable({*before, *active.values()})

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the ``with`` block, run the base without adapters in every stage; sets activated in it run afterwards.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> with lorun.disable_adapter():
        ...     print(lorun.network is lorun.base)
        True
        """
        with self._lock:
            self._disabled += 1
            if self._disabled == 1:
                take_modes(self.base, self.network, self.training)
                self.network = self.base
        try:
            yield
        finally:
            with self._lock:
                self._disabled -= 1
                if not self._disabled:  # another thread may be in such a block, too
                    self.network = self._active_network()

    @in_own_modes
    def merge_adapter(self, safe_merge: bool = False) -> None:
        """Compute the weights of the active sets once, until :meth:`unmerge_adapter`, as in PEFT.

        Otherwise each forward computes them from the base and the adapters, which takes noticeable time on small
        images. Merged weights take as much memory as the original's. The active sets are frozen while merged;
        :meth:`set_adapter` and training (:meth:`train`, :meth:`recover`, :meth:`finetune`) unmerge them too. An active
        set that is replaced is merged again. Weights that are faster as factors are not merged.

        Args:
            safe_merge: refuse weights with NaN or Inf.

        Raises:
            LoRunError: with ``safe_merge``, a weight with NaN or Inf; nothing changes then.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun, x = lorun_adapt.convert(ToyUnfoldingNet(), rank=1), torch.rand(1, 1, 8, 8)
        >>> before = lorun(x)
        >>> lorun.merge_adapter()
        >>> torch.equal(lorun(x), before), lorun.get_nb_trainable_parameters()[0]
        (True, 0)
        >>> lorun.unmerge_adapter()
        """
        with self._lock:
            network = self._merged_network()
            if safe_merge:
                check_merged([*merged_tensors(network), *distinct_tensors(network).items()])
            self._running.merged = True
            if not self._disabled:
                self.network = network
            self._set_trainable(self._running.names)

    @in_own_modes
    def int8(self) -> Self:
        """Hold the stages' matrices and kernels in eight bits, with a scale for each row or column, in place.

        They take about a quarter of the memory, as their files do with ``save_pretrained(path, torch.int8)``, and are
        rounded likewise. Each forward computes the stages' weights from them, in the dtype that they had before.
        Tensors in eight bits cannot be trained. Sets that are added later, also by :meth:`finetune` or
        :meth:`copy_adapter`, hold floats. To get a base of floats again, load a network that was saved before ``int8``.

        Returns:
            This network.

        Raises:
            LoRunError: NaN or Inf in a tensor; nothing changes then.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun, x = lorun_adapt.convert(ToyUnfoldingNet(), rank=1), torch.rand(1, 1, 8, 8)
        >>> before, size = lorun(x), lorun.report().network_after.num_bytes
        >>> lorun = lorun.int8()
        >>> bool((lorun(x) - before).abs().max() < 0.01), lorun.report().network_after.num_bytes < 0.6 * size
        (True, True)
        """
        with self._lock:
            before, network = self.converted(), self.network
            packed = in_eight_bits(before)
            try:
                self._take(packed)
                self._assemble_again()
            except BaseException:
                self._take(before)
                self._running.clear()
                self.network = network
                raise
            self._rounded = {fingerprint_of(distinct_tensors(self.base)): before.fingerprint}
            self._set_trainable(self._running.names)
        return self

    @in_own_modes
    def unmerge_adapter(self) -> None:
        """Compute the weights in each forward again, and make the active sets trainable as before.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.merge_adapter()
        >>> lorun.unmerge_adapter()
        >>> lorun.get_nb_trainable_parameters()[0]
        297
        """
        with self._lock:
            if self._running.merged:
                self._running.merged = False
                if not self._disabled:
                    self.network = self._active_network()
                self._set_trainable(self._running.names)

    @in_own_modes
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
        """Load an adapter set, or the adapter of one stage. Activate it with :meth:`set_adapter`.

        Args:
            source: one of: a saved folder (loads its set ``adapter_name``, or its only set); the folder of a set; with
                ``stage``, the folder of one stage, or its safetensors file, with ``adapter_config.json`` in the same
                folder; a repository of the Hub, as ``user/name`` (downloads only the files needed).
            adapter_name: letters, digits, ``_`` and ``-``. This replaces a loaded set of that name; with ``stage``,
                it replaces only that stage.
            stage: load only the adapter of this stage, counted from 0.
            revision, subfolder, token, cache_dir, local_files_only: options of the repository, as in
                ``huggingface_hub.hf_hub_download``.

        Raises:
            LoRunError: files that are missing, damaged, or for another base; nothing changes then.

        >>> import lorun_adapt, tempfile
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lorun.save_pretrained(folder + "/saved")
        ...     lorun.load_adapter(folder + "/saved", "copy")
        >>> lorun.adapter_names
        ['default', 'copy']
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
        with self._lock:
            if stage is not None and adapter_name in self._store:
                before = self._store.get(adapter_name)
                info = dataclasses.replace(before.info, quality=())
                adapters = {**before.adapters, **held.adapters}
                held = dataclasses.replace(before, adapters=adapters, config=held.config, info=info)
            self._put(adapter_name, held)

    @in_own_modes
    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Add an untrained set, as in PEFT: it does not change the base's output until it is trained.

        Args:
            adapter_name: a new name.
            config: the tensors to adapt and their ranks; names are relative to the denoiser. ``peft_config`` has those
                of the loaded sets.

        Raises:
            LoRunError: a name that is already used, or a config that :func:`lorun_adapt.convert` would refuse.

        >>> import lorun_adapt
        >>> from peft import LoraConfig
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.add_adapter("new", LoraConfig(r=2))
        >>> lorun.adapter_names
        ['default', 'new']
        """
        self._check_new(adapter_name)
        with self._lock:
            self._put(
                adapter_name, untrained_set(self.base, self.stage_map, config, plan(self.base, self.stage_map, config))
            )

    @in_own_modes
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add a set that is a weighted sum of other sets, like PEFT's ``combination_type="svd"``.

        For each tensor, the sum of the low-rank terms is truncated by SVD to the largest of their ranks. For the
        stages' private tensors, the differences from the base are summed. Weights that sum to 1 interpolate. The new
        set has the stages that all the given sets have.

        Args:
            adapters: names of loaded sets.
            weights: a finite number for each set; it may be negative.
            adapter_name: the name of the new set; this replaces a set of that name.

        Raises:
            LoRunError: an unknown set, lists of different lengths, or a sum with NaN or Inf; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "other")
        >>> lorun.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
        >>> lorun.adapter_names
        ['default', 'other', 'mean']
        """
        check_adapter_name(adapter_name)
        with self._lock:
            self._put(adapter_name, self._weighted(adapters, weights))

    @in_own_modes
    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Add a set that is a copy of the set ``source``.

        Raises:
            LoRunError: an unknown set, or a name that is already used; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "mine")
        >>> lorun.adapter_names
        ['default', 'mine']
        """
        with self._lock:
            self._store.check_known(source)
            self._check_new(adapter_name)
            self._put(adapter_name, copied_in_floats(self._store.get(source)))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a set that is not active in any stage.

        Raises:
            LoRunError: an unknown set, or an active one; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "mine")
        >>> lorun.delete_adapter("mine")
        >>> lorun.adapter_names
        ['default']
        """
        with self._lock:
            self._store.check_known(adapter_name)
            if adapter_name in self._running.names:
                raise LoRunError(f"cannot delete the active set {adapter_name!r}: activate another set first")
            self._running.forget(adapter_name)
            self._store.drop(adapter_name)

    def adapter_of(self, group: Group, site: Site, adapter_name: str | None = None) -> StageAdapter:
        """Return the adapter of one denoiser.

        Args:
            group: one of ``lorun.stage_map.groups``.
            site: one of its ``sites``.
            adapter_name: the set; by default, the stage's active set.

        Raises:
            LoRunError: an unknown set, or one without an adapter for the stage.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> group = lorun.stage_map.groups[0]
        >>> lorun.adapter_of(group, group.sites[0]) is lorun.adapters["default"]["stage_00"][group.name]
        True
        """
        name = self._running.active[site.stage] if adapter_name is None else adapter_name
        self._check_active({site.stage: name})
        return self._store.adapters_at(name, site.stage)[group.name]

    @in_own_modes
    def add_outside(self, adapter_name: str, also: str | Sequence[str]) -> None:
        """Give a set its own copies of parameters outside the stages, such as step sizes and noise levels.

        While all stages run with the set, the copies take the place of the base's parameters. They are trainable then,
        in any training loop, and are saved with the set. :meth:`finetune` does the same with its ``also``.

        Args:
            adapter_name: a loaded set. Copies that it has already stay as they are.
            also: glob patterns of parameters outside the stages, such as ``"step_sizes"`` or ``"condition.*"``.

        Raises:
            LoRunError: an unknown set, or a pattern that matches no parameter outside the stages; nothing changes then.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> net = ToyUnfoldingNet()
        >>> net.gain = torch.nn.Parameter(torch.ones(()))
        >>> lorun = lorun_adapt.convert(net, rank=1)
        >>> lorun.add_outside("default", "gain")
        >>> lorun.network.gain.requires_grad, lorun.base.gain.requires_grad
        (True, False)
        """
        from ..training.finetune import matching_parameters

        with self._lock:
            held = self._store.get(adapter_name)
            own = matching_parameters(self.base, self.stage_map, also)
            self._put(adapter_name, dataclasses.replace(held, outside={**own, **held.outside}))

    def outside_of(self, adapter_name: str) -> Mapping[str, Tensor]:
        """Return the parameters outside the stages that a set replaces, by name.

        Raises:
            LoRunError: an unknown set.
        """
        return self._store.get(adapter_name).outside

    # --- images ----------------------------------------------------------------------------------

    def restore(self, images: Tensor, *, sigma: float = 0.0, tile: int | None = None, overlap: int = 16) -> Tensor:
        """Measure images as the task does, and restore them from the measurements.

        Args:
            images: (B, C, H, W), in [0, 1].
            sigma: noise on the measurements (0..255).
            tile: the side of the tiles to restore in, in pixels; needs a :attr:`task` that sets ``tile``.
            overlap: the overlap of the tiles, in pixels.

        Returns:
            The restored images, (B, C, H, W), float32, on the CPU.

        Raises:
            LoRunError: :attr:`task` is no :class:`Task`, or a function of it fails; tiles for a network that is not
                local, or of sides that do not fit.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun_adapt.convert(ToyUnfoldingNet(), rank=1).restore(torch.rand(1, 1, 8, 8))
        Traceback (most recent call last):
            ...
        lorun_adapt.errors.LoRunError: no task to measure with: set lorun.task = lorun_adapt.load_task("my_task.py")
        """
        from ..task.restore import restore
        from ..task.task import Task

        if not isinstance(self.task, Task):
            raise LoRunError('no task to measure with: set lorun.task = lorun_adapt.load_task("my_task.py")')
        with self.assume_noise(sigma) if sigma else contextlib.nullcontext():
            return restore(self.task, self, images, sigma, tile, overlap)

    # --- noise -----------------------------------------------------------------------------------

    @property
    def task(self) -> Any:
        """A :class:`Task`, or any object with its functions ``schedule`` and ``noise_level``; either may be missing.

        ``schedule(net, sigmas)`` sets the noise schedule of the active sets in a network, one sigma per stage.
        ``noise_level(args)`` estimates sigma from the arguments of a forward. Sigmas are on a scale of 0 to 255.
        """
        return self._noise.task

    @task.setter
    def task(self, task: Any) -> None:
        with self._lock:
            before, self._noise.task = self._noise.task, task
            try:
                self._assemble_again()
            except BaseException:
                self._noise.task = before
                raise

    @in_own_modes
    def set_noise(
        self, adapter_name: str, *, sigma: float | None = None, noise_schedule: Sequence[float] | None = None
    ) -> None:
        """Set the noise level that a set is for; without ``sigma`` and ``noise_schedule``, mark it as unknown.

        Args:
            adapter_name: a loaded set.
            sigma: standard deviation of the noise on the measurements, on a scale of 0 to 255.
            noise_schedule: instead of ``sigma``, one standard deviation for each stage.

        Raises:
            LoRunError: an unknown set, a negative number, or a schedule of the wrong length; nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.set_noise("default", sigma=25)
        >>> lorun.adapter_info["default"].sigma
        25.0
        """
        with self._lock:
            held = self._store.get(adapter_name)
            info = held.info.with_noise(noise_of(sigma, noise_schedule, len(self.stage_map)))
            self._put(adapter_name, dataclasses.replace(held, info=info))

    @contextmanager
    def assume_noise(self, sigma: float) -> Iterator[None]:
        """Within the ``with`` block, treat active sets of unknown noise level as sets for ``sigma``.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> with lorun.assume_noise(25):
        ...     print(lorun.adapter_info["default"].sigma)
        25.0
        """
        unknown = [name for name in self._running.names if self.adapter_info[name].noise is None]
        try:
            for name in unknown:
                self.set_noise(name, sigma=sigma)
            yield
        finally:
            for name in unknown:
                if name in self._store and self.adapter_info[name].noise == sigma:
                    self.set_noise(name)

    def select_adapter(self, sigma: float | str, *arguments: Any) -> str:
        """Activate the set for a noise level.

        If a set is for exactly this level, that set runs. If the level lies between the levels of two sets, their
        weighted sum runs, under the reserved name ``interpolated``; the next interpolation replaces it, and it is
        never saved. Otherwise the set with the nearest level runs, with a warning.

        Args:
            sigma: standard deviation of the noise on the measurements, on a scale of 0 to 255; or ``"auto"`` to let
                the task's ``noise_level`` estimate it.
            arguments: with ``"auto"``, the arguments of a forward.

        Returns:
            The name of the active set.

        Raises:
            LoRunError: no set with a known noise level (see :meth:`set_noise`); a negative sigma; ``"auto"`` without
                arguments, or without a task that has ``noise_level``. Nothing changes then.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "noisy")
        >>> lorun.set_noise("default", sigma=10)
        >>> lorun.set_noise("noisy", sigma=50)
        >>> lorun.select_adapter(50), lorun.select_adapter(20)
        ('noisy', 'interpolated')
        """
        sigma = self._noise.estimate(sigma, arguments)
        with self._lock:
            name, made = self._set_for(sigma)
            try:
                self.set_adapter(name, self._running.inference_mode)
            except BaseException:
                if made:
                    self.delete_adapter(name)
                raise
            return name

    def weights_for(self, sigma: float, among: Iterable[str] | None = None) -> dict[str, float]:
        """Return the weights of the sets that :meth:`select_adapter` would use for a noise level.

        Args:
            sigma: standard deviation of the noise on the measurements, on a scale of 0 to 255.
            among: names of the sets to choose from; by default all.

        Raises:
            LoRunError: no set with a known noise level.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.copy_adapter("default", "noisy")
        >>> lorun.set_noise("default", sigma=10)
        >>> lorun.set_noise("noisy", sigma=50)
        >>> lorun.weights_for(20)
        {'default': 0.75, 'noisy': 0.25}
        """
        infos = {name: info for name, info in self.adapter_info.items() if name != INTERPOLATED}
        return self._noise.weights(sigma, infos, among)

    # --- training --------------------------------------------------------------------------------

    @in_own_modes
    def recover(
        self,
        teacher: nn.Module,
        calibration: Iterable[Any],
        *,
        minutes: float | None = None,
        steps: int | None = None,
        loss: Loss | None = None,
        also: str | Sequence[str] = (),
        recompute: bool = False,
        prune: int | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> bool:
        """Recover the quality of the original network by distillation.

        This trains the base and the adapters. Parameters outside the stages, such as a sampling matrix, and all buffers
        stay as they are, bit for bit, unless ``also`` names them. Three phases share the time: a factorisation in
        closed form; training of each stage by itself, on the inputs that the teacher gives to its own stage; training
        end to end. A phase that does not apply to the network, or stops paying, is left out or ends early.

        Both networks run in ``eval()`` mode. Progress goes to standard error. The best weights, judged on the first two
        batches, are kept, also after Ctrl-C; a warning says so if these are the weights it began with. If the loss
        grows much or becomes NaN, training returns to the best weights and halves the learning rate. Under
        ``accelerate launch``, the processes share the stages while these train by themselves, and then draw batches of
        their own.

        Args:
            teacher: the original network; it is not changed.
            calibration: an iterable of argument tuples of the forward, or of tensors if the forward takes one, on any
                device. It repeats when it ends. No ground truth is needed.
            minutes, steps: how long to train; give exactly one.
            loss: with ground truth, a callable ``loss(output, batch)`` that replaces the distance to the teacher's
                output. A batch may hold more than the positional arguments of the forward; only the loss sees the
                rest.
            also: glob patterns of parameters outside the stages to train as well.
            recompute: run each stage again in the backward pass instead of keeping its intermediate results. This saves
                memory, and makes a step about a third longer.
            prune: the rank that sparse terms end with, see :class:`SparseConfig`. Training then has several rounds of
                equal length; after each but the last, the smallest entries are dropped, and training begins again from
                the values that the others had early on.
            resume_from: a state file. The run stores its state there, and resumes from it if it exists. Remove it when
                you have saved the result: the same call would otherwise return to it. With ``prune``, earlier rounds
                have files beside it until the run ends, and a run resumes with the conversion that it began with.
            seed: seed of all random numbers. The same seed and ``steps`` give the same weights on a CPU.

        Returns:
            True if training finished, False if Ctrl-C stopped it.

        Raises:
            LoRunError: a calibration that is empty, does not fit the network, or has only NaN or Inf; a teacher with
                other tensors; several adapter sets; stages that share no base; a pattern that matches no parameter
                outside the stages; both or neither of minutes and steps; within :meth:`disable_adapter`; with
                ``recompute``, a stage whose inputs are changed in place; with ``prune``, terms that are not sparse, or
                a rank that is not below theirs.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> net = ToyUnfoldingNet()
        >>> lorun = lorun_adapt.convert(net, rank=1)
        >>> lorun.recover(net, [torch.rand(2, 1, 8, 8)], steps=20)
        True
        """
        from ..training.recovery import recover  # imported here: training needs libraries that inference does not

        if not self.stage_map.shared:
            raise LoRunError(
                "the stages keep their own weights, so there is nothing to recover: train a set with finetune"
            )
        self._check_enabled()
        duration = Duration(minutes, steps)
        path = None if resume_from is None else as_path(resume_from)
        with seeded(seed):
            batches = Batches(calibration)
        if prune is not None:
            return self._recover_in_rounds(
                prune,
                duration,
                path,
                teacher=teacher,
                calibration=batches,
                loss=loss,
                also=also,
                recompute=recompute,
                seed=seed,
            )
        before, frozen = self._hashes(), self._running.inference_mode
        self.unmerge_adapter()
        try:
            self._set_inference_mode(False)
            return recover(
                self.converted(),
                self.network,
                teacher,
                batches,
                duration,
                loss,
                also,
                recompute,
                path,
                seed,
                closed_form=not self._recovered,
            )
        finally:
            self._set_inference_mode(frozen)
            self._recovered |= self._drop_outdated(before)

    def _recover_in_rounds(self, rank: int, duration: Duration, path: Path | None, **settings: Any) -> bool:
        from .pruning import recover_in_rounds  # imported here: training needs libraries that inference does not

        if len(self.adapter_names) > 1:
            raise LoRunError(
                f"recovery changes the base, which the sets {self.adapter_names} share: prune before you add others"
            )
        (name,) = self.adapter_names
        self.unmerge_adapter()

        def run(part: Duration, file: Path | None) -> bool:
            return self.recover(minutes=part.minutes, steps=part.steps, resume_from=file, **settings)

        def put(held: AdapterSet) -> None:
            self._put(name, held)
            self.stage_map = dataclasses.replace(self.stage_map, ranks=ranks_in(held))

        return recover_in_rounds(
            run, lambda: self._store.get(name), put, self.base, self.stage_map, duration, rank, path
        )

    @in_own_modes
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
        recompute: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> bool:
        """Train a new adapter set on the frozen base, for example for another noise level.

        The base, the other sets, and the network's parameters outside the stages do not change. The new set stays
        active. The best weights, judged on held-out batches, are kept; a set trained on few images therefore does not
        end worse than it started. After three, six and nine checks in a row without better ones, training goes on from
        the best with half the learning rate; after ten, it stops. Progress, Ctrl-C, NaN and ``accelerate launch`` work
        as in :meth:`recover`.

        Args:
            batches: an iterable of argument tuples of the forward, or of tensors if the forward takes one. It repeats
                when it ends. Items beyond the positional arguments of the forward are for ``loss``.
            adapter_name: a new name.
            start_from: the set to start from. With several, training starts from their interpolation at ``sigma`` if
                their noise levels are known, otherwise from their mean.
            sigma: standard deviation of the noise on the measurements, on a scale of 0 to 255;
                :meth:`select_adapter` chooses the set by it.
            noise_schedule: instead of ``sigma``, one standard deviation for each stage, which ``schedule`` of
                :attr:`task` receives.
            also: glob patterns of parameters outside the stages that depend on the noise, such as ``"step_sizes"`` or
                ``"condition.*"``. The set gets its own copies, which are trained and saved with it.
            minutes, steps: how long to train; give exactly one.
            loss: a callable ``loss(output, batch)`` to minimise.
            teacher: a network of the original class to distil from, instead of or in addition to ``loss``.
            held_out: batches to judge the weights by, from images that are not in ``batches``. By default the first
                two of ``batches``; they are left out of training if ``batches`` is an iterator, or a list of more than
                three.
            recompute, resume_from, seed: as in :meth:`recover`. If the state file exists, training of the set
                ``adapter_name`` continues.

        Returns:
            True if training finished, False if Ctrl-C stopped it.

        Raises:
            LoRunError: neither loss nor teacher; a name that is already used; an unknown set in ``start_from``; a
                pattern that matches no parameter outside the stages; batches as for :meth:`recover`; within
                :meth:`disable_adapter`. No set is added then, and the active sets stay active.

        >>> import lorun_adapt, torch
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> net = ToyUnfoldingNet()
        >>> lorun, batches = lorun_adapt.convert(net, rank=1), [(torch.rand(2, 1, 8, 8),) for _ in range(4)]
        >>> lorun.finetune(batches, "sigma25", sigma=25, teacher=net, steps=1)
        True
        >>> lorun.active_adapters
        ['sigma25']
        """
        from ..training.finetune import finetune, matching_parameters

        self._check_enabled()
        duration = Duration(minutes, steps)
        path = None if resume_from is None else as_path(resume_from)
        before = self._running.active, self._running.inference_mode
        starts = [start_from] if isinstance(start_from, str) else list(start_from)
        stopped = self._store.get(adapter_name) if adapter_name in self._store else None
        if stopped is None or path is None or not path.exists() or adapter_name in starts:
            self._check_new(adapter_name)
        own = matching_parameters(self.base, self.stage_map, also)
        noise = noise_of(sigma, noise_schedule, len(self.stage_map))
        try:
            if stopped is not None:  # start from the same weights as the stopped run, as the state file expects
                self.set_adapter(starts[0])
                self.delete_adapter(adapter_name)
            initial = self._initial_set(starts, noise)
            outside = {**own, **initial.outside}
            self._put(adapter_name, dataclasses.replace(initial, outside=outside, info=initial.info.with_noise(noise)))
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
                recompute=recompute,
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

    @in_own_modes
    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        adapters_only: bool = False,
        selected_adapters: Sequence[str] | None = None,
    ) -> None:
        """Save the base and the adapters as safetensors and JSON. The folder is written completely or not at all.

        Args:
            path: a new or empty folder, or a saved folder, which is replaced: sets that are only there are deleted.
            dtype: store floating-point tensors in this dtype, such as ``torch.float16`` for smaller files.
                ``torch.int8`` stores the stages' matrices and kernels in eight bits, with a scale for each channel;
                other tensors keep their dtype, and PEFT cannot read such adapters.
            adapters_only: save no base. The files name its fingerprint; :meth:`load_adapter` loads them.
            selected_adapters: names of the sets to save; by default all except ``interpolated``.

        Raises:
            LoRunError: ``path`` has other files in it; an unknown set; a stage without an adapter in the selected
                sets; NaN or Inf in a tensor; a disk that is full or not writable. The folder stays as it was.

        >>> import lorun_adapt, tempfile
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lorun.save_pretrained(folder + "/saved")
        ...     again = lorun_adapt.from_pretrained(folder + "/saved", ToyUnfoldingNet())
        >>> again.adapter_names
        ['default']
        """
        save(select_sets(self.converted(), selected_adapters), as_path(path), dtype, adapters_only)

    @in_own_modes
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
        """Save to a repository of the Hub; create the repository if it does not exist.

        Args:
            repo_id: ``user/name``.
            adapters_only: upload no base; users then load the base from elsewhere.
            private: whether a new repository is private; by default, the account's setting.
            revision: the branch; it is created if it does not exist.
            token: by default, the token that ``hf auth login`` stored, or ``HF_TOKEN``.
            dtype: store floating-point tensors in this dtype, as in :meth:`save_pretrained`.
            commit_message: by default, a message with the names of the sets.
            create_pr: open a pull request instead of committing.

        Returns:
            The URL of the commit.

        Raises:
            LoRunError: no access or no connection; with ``adapters_only``, a repository that has a base.
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

    @in_own_modes
    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """Return a network of the original class with merged, dense weights; this model does not change.

        Args:
            safe_merge: refuse a result with NaN or Inf.
            adapter_names: sets to merge instead of the active ones. With several, their updates are summed.

        Raises:
            LoRunError: the original class has one module for all stages (one that is called in a loop, or that has
                several parents), or ties parameters, and what is merged differs; an unknown set, or one without an
                adapter for a stage; with ``safe_merge``, NaN or Inf.

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
            actives = [self._running.resolve(name) for name in names]
            for active in actives:
                self._check_active(active)
            if not actives:
                raise LoRunError("no adapter set to merge: name one in adapter_names")
            choices, active = [self._choice(active) for active in actives], actives[0]
            outsides = [self._store.get(name).outside for name in names]
            outside = weighted_outside(self.base, self.stage_map, outsides, [1.0] * len(names))
        network = merge(self.base, self.stage_map, choices, outside)
        tie_again(network, self._ties)
        self._prepare(network, active)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in self.trainable_names)
        if safe_merge:
            check_merged(distinct_tensors(network).items())
        return network.train(self.training)

    @in_own_modes
    def base_denoiser(self, group: str | None = None, stage: int | None = None) -> nn.Module:
        """Return a copy of a denoiser of the base, the shared one or that of ``stage``: a module of the original class.

        PEFT can load a stage's adapter on it, unless the model card says that PEFT cannot represent the stage:
        ``PeftModel.from_pretrained(lorun.base_denoiser(), "saved/adapters/default/stage_03")``.

        Args:
            group: the denoiser's group, required if a stage has several denoisers; one of
                ``[g.name for g in lorun.stage_map.groups]``.
            stage: the stage, counted from 0; required if the stages share no base.

        Raises:
            LoRunError: an unknown group or stage, or none given where there are several.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> type(lorun_adapt.convert(ToyUnfoldingNet(), rank=1).base_denoiser()).__name__
        'ToyStage'
        """
        groups = {item.name: item for item in self.stage_map.groups}
        if group is None and len(groups) == 1:
            group = next(iter(groups))
        if group not in groups:
            raise LoRunError(f"expected the name of a denoiser among {list(groups)}, found {group!r}: give group=")
        sites = {site.stage: site for site in groups[group].sites}
        if stage is None and (self.stage_map.shared or len({site.module for site in sites.values()}) == 1):
            stage = next(iter(sites))
        if not is_index(stage) or int(stage) not in sites:
            raise LoRunError(f"expected one of the stages {list(sites)} of {group!r}, found {stage!r}: give stage=")
        return in_floats(base_denoiser(self.base, self.stage_map, groups[group], sites[int(stage)]))

    # --- figures ---------------------------------------------------------------------------------

    def note_quality(self, quality: Quality) -> None:
        """Record the measured quality of the active set for its model card.

        A new measurement replaces an earlier one on the same images at the same sigma.

        Raises:
            LoRunError: stages that run different sets, or a measurement with NaN or Inf.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
        >>> lorun.note_quality(lorun_adapt.Quality("set12", count=12, sigma=25.0, psnr=28.1, ssim=0.8))
        >>> lorun.adapter_info["default"].quality[0].psnr
        28.1
        """
        name = self._running.common_set
        if name is None:
            raise LoRunError(
                f"the stages run different sets, {sorted(self._running.names)}: activate the measured set in all stages"
            )
        if not is_storable(quality):
            raise LoRunError(
                f"expected finite figures measured on at least one image, and lower-case names of further metrics, "
                f"found {quality}: check the network's output for NaN, and the names"
            )
        self.adapter_info[name] = self.adapter_info[name].with_quality(quality)

    def report(self) -> Report:
        """Return the numbers of parameters and bytes before and after conversion, and the relative residuals.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> report = lorun_adapt.convert(ToyUnfoldingNet(), rank=1).report()
        >>> report.network_before.num_parameters, report.network_after.num_parameters
        (462, 451)
        """
        return make_report(self.converted())

    def num_parameters(self) -> int:
        """Return the number of parameters of the base and all sets; :meth:`report` counts only the active sets."""
        held = {id(tensor) for tensor in base_tensors(self.base, self.stage_map).values()}
        held |= {id(parameter) for sets in (self.adapters, self.outside) for parameter in sets.parameters()}
        return sum(parameter.numel() for parameter in self.parameters() if id(parameter) in held)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters and the number of all parameters, as in PEFT.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun_adapt.convert(ToyUnfoldingNet(), rank=1).get_nb_trainable_parameters()
        (297, 451)
        """
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trainable, self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters in PEFT's format.

        >>> import lorun_adapt
        >>> from lorun_adapt.util.toy import ToyUnfoldingNet
        >>> lorun_adapt.convert(ToyUnfoldingNet(), rank=1).print_trainable_parameters()
        trainable params: 297 || all params: 451 || trainable%: 65.8537
        """
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    # --- torch -----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the original network that this class does not define."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("network")
            if network is None or not hasattr(network, name):
                raise
            return getattr(network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "task":  # bypass nn.Module, which would train, move and save a task that is a module
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network, as in PyTorch; training mode ends :meth:`merge_adapter`."""
        if mode:
            self.unmerge_adapter()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch replaces buffers (and, with some settings, parameters) separately at each place that holds them, so
        # places that shared a tensor would end up with separate copies.
        _ = self.fingerprint  # computed before the dtype changes
        shared = shared_places(self.base, self.adapters)
        super()._apply(fn, recurse)
        share_again(shared)
        self._note_base()
        self._assemble_again()
        return self

    @in_own_modes
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = self.__new__(type(self))
        memo[id(self)] = result
        memo[id(self._lock)] = threading.RLock()  # locks cannot be copied
        result.__dict__ = deep_copy({**self.__dict__, "_reader": None, "_disabled": 0}, memo)
        if self._disabled:  # the copy is in no block of disable_adapter
            result.network = result._active_network()
        return result

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LoRunError(
            "cannot pickle a LoRunModel (torch.save, pickle, a spawned process): use save_pretrained, or torch.save of "
            "its state_dict()"
        )

    # --- internals -------------------------------------------------------------------------------

    def replace_tensors(self, base_changed: bool) -> None:
        """Assemble the network again after :meth:`load_state_dict` replaced tensors."""
        if base_changed:
            self._fingerprint = None
        self._note_base()
        self._assemble_again()

    def _take(self, converted: Converted) -> None:
        """Hold the base and the sets of the same network in another form."""
        if self.network is self.base:  # within disable_adapter
            self.network = converted.base
        self.base = converted.base
        self._note_base()
        for name, held in converted.sets.items():
            self._store.put(name, held)

    def _note_base(self) -> None:
        """Note the tensors that the fingerprint is of; listing them at each access would be slow."""
        self._base_tensors = [*self.base.parameters(), *self.base.buffers()]
        self._versions = versions_of(self._base_tensors)

    def _assemble_again(self) -> None:
        self._running.clear()
        self._reader = None
        if self.network is not self.base:
            self.network = self._active_network()

    def _active_network(self) -> nn.Module:
        """Return the network for the active sets, merged if it was."""
        return self._merged_network() if self._running.merged else self._network_for(self._running.active)

    @in_own_modes
    def _merged_network(self) -> nn.Module:
        network = self._assembled(self._running.active)
        merge_terms(network)
        take_modes(network, self.network, self.training)
        return network

    def _network_for(self, active: Mapping[int, str]) -> nn.Module:
        """Return the network for a choice of sets; its modules take the train/eval modes of the current network."""
        return self._running.network(active, lambda: self._assembled(active), self.network, self.training)

    @in_own_modes
    def _assembled(self, active: Mapping[int, str]) -> nn.Module:
        outside, repeats_last = self._outside_of(active), self._beyond == "last"
        network = assemble(self.base, self.stage_map, self._choice(active), outside, repeats_last)
        self._prepare(network, active)
        return network

    def _prepare(self, network: nn.Module, active: Mapping[int, str]) -> None:
        """Set the noise schedule of the active sets in a network."""
        self._noise.prepare(network, [self.adapter_info[active[stage]].noise for stage in range(len(self.stage_map))])

    def _choice(self, active: Mapping[int, str]) -> Choice:
        return {stage: self._store.adapters_at(name, stage) for stage, name in active.items()}

    def _outside_of(self, active: Mapping[int, str]) -> Mapping[str, Tensor]:
        """Return the parameters outside the stages that replace the base's: those of a set active in all stages."""
        names = set(active.values())
        return self._store.get(names.pop()).outside if len(names) == 1 else {}

    def _put(self, name: str, held: AdapterSet) -> None:
        """Store a set, replacing one of that name; if that set is active, the new one becomes active."""
        for stage, active in self._running.active.items():
            if active == name:
                _check_holds(name, stage, held.adapters)
        before = self._store.get(name) if name in self._store else None
        self._store.put(name, held)
        self._running.forget(name)
        if name in self._running.names and self.network is not self.base:
            try:
                self.network = self._active_network()
            except BaseException:
                self._store.drop(name) if before is None else self._store.put(name, before)
                raise
        if before is None or not before.has_tensors_of(held):  # otherwise only what is known of the set has changed
            self._set_trainable([name])

    def _set_trainable(self, names: Iterable[str]) -> None:
        """Make only the active sets' adapters trainable (none in inference mode, or if they are merged)."""
        running, frozen = self._running, self._running.inference_mode or self._running.merged
        for name in set(names):
            stages = [] if frozen else [stage for stage, active in running.active.items() if active == name]
            self._store.set_trainable(name, stages, outside=not frozen and running.common_set == name)

    def _set_inference_mode(self, inference_mode: bool) -> None:
        with self._lock:
            if self._running.inference_mode is not inference_mode:
                self._running.inference_mode = inference_mode
                self._set_trainable(self._running.names)

    def _check_enabled(self) -> None:
        if self._disabled:
            raise LoRunError("training needs the adapters: train outside of disable_adapter()")

    def _check_active(self, active: Mapping[int, str]) -> None:
        for stage, name in active.items():
            self._store.check_known(name)
            _check_holds(name, stage, self._store.stages(name))

    def _check_new(self, name: str) -> None:
        check_adapter_name(name)
        if name in self._store:
            raise LoRunError(f"the set {name!r} already exists: choose another name, or delete it first")

    def _weighted(self, names: Sequence[str], weights: Sequence[float]) -> AdapterSet:
        if isinstance(names, str) or len(names) == 0 or len(names) != len(weights):
            raise LoRunError(
                f"expected as many weights as adapters, at least one, found {weights!r} for {names!r}: give two lists "
                "of the same length"
            )
        sets = [self._store.get(name) for name in names]
        for name, held in zip(names, sets):
            check_values(name, held)
        return weighted_set(self.base, self.stage_map, sets, weights)

    def _set_for(self, sigma: float) -> tuple[str, bool]:
        """Return the name of the set for a noise level, and whether this call created it."""
        weights = self.weights_for(sigma)
        if len(weights) == 1:
            name = next(iter(weights))
            if (known := self.adapter_info[name].sigma) != sigma:
                warnings.warn(
                    f"no set is for a sigma of {sigma:g}: using the nearest, {name}, which is for {known:g}",
                    stacklevel=3,
                )
            return name, False
        names, recipe, known_set = [*weights, INTERPOLATED], (sigma, weights), INTERPOLATED in self._store
        if not known_set or not self._noise.is_interpolated(recipe, self._tensors_of(names)):
            held = self._weighted(list(weights), list(weights.values()))
            self._put(INTERPOLATED, dataclasses.replace(held, info=held.info.with_noise(sigma)))
            self._noise.note_interpolated(recipe, self._tensors_of(names))
        return INTERPOLATED, not known_set

    def _tensors_of(self, names: Iterable[str]) -> list[Tensor]:
        """Return the tensors of sets."""
        held = [place[name] for name in names for place in (self.adapters, self.outside) if name in place]
        return [tensor for module in held for tensor in (*module.parameters(), *module.buffers())]

    def _initial_set(self, names: Sequence[str], noise: Noise | None) -> AdapterSet:
        """Return a new set with the values of one set, or of an interpolation of several."""
        for name in names:
            self._store.check_known(name)
        if len(set(names)) < len(names):
            raise LoRunError(f"start_from lists a set twice, {list(names)}: name each set once")
        weights = dict.fromkeys(names, 1 / max(len(names), 1))
        if names and isinstance(noise, float) and all(self.adapter_info[name].sigma is not None for name in names):
            weights = self.weights_for(noise, names)
        if len(weights) == 1:
            held = copied_in_floats(self._store.get(next(iter(weights))))
        else:
            held = self._weighted(list(weights), list(weights.values()))
        return dataclasses.replace(held, info=dataclasses.replace(held.info, quality=()))

    def _hashes(self) -> tuple[str, str]:
        """Return the hashes of the base in memory and of all tensors."""
        return fingerprint_of(distinct_tensors(self.base)), fingerprint_of(tensors_in_state(self))

    def _drop_outdated(self, before: tuple[str, str]) -> bool:
        """Drop the fingerprint and the measured qualities if training has changed what they describe; tell if so."""
        now = self._hashes()
        if now[0] != before[0]:
            self._fingerprint = None
        if now != before:
            for name, info in self.adapter_info.items():
                self.adapter_info[name] = dataclasses.replace(info, quality=())
        return now != before


def _check_holds(name: str, stage: int, stages: Collection[int]) -> None:
    if stage not in stages:
        raise LoRunError(
            f"the set {name!r} has no adapter for stage {stage}, only for {list(stages)}: activate it in those "
            "stages, with {stage: name}"
        )
