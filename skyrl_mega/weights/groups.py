"""Which tensors of a version are still to come, and that fused ones come together."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_mega.errors import WeightSyncError


class AnnouncedGroups:
    """The names of one version, in groups that travel in one bucket (`WeightSource.fused_groups`)."""

    def __init__(self, groups: Sequence[tuple[str, ...]]) -> None:
        self._group_of = {name: group for group in groups for name in group}
        self._waiting = set(self._group_of)

    def take(self, names: Sequence[str]) -> None:
        """A bucket of `names` is about to be sent. Raises WeightSyncError if it splits a group, or has a wrong name."""
        unexpected = [name for name in names if name not in self._waiting]
        if unexpected or len(set(names)) != len(names):
            raise WeightSyncError(
                f"every tensor of a version must be announced in start and sent once; unknown or repeated: {unexpected or names}."
            )
        present = set(names)
        for name in names:
            absent = [other for other in self._group_of[name] if other not in present]
            if absent:
                raise WeightSyncError(
                    f"fused tensors must travel in one bucket: {name} came without {', '.join(absent)}. "
                    "The engine would mix two versions in one matrix."
                )
        self._waiting -= present

    def require_all(self, version: int) -> None:
        """Raises WeightSyncError unless every name was taken."""
        if self._waiting:
            raise WeightSyncError(
                f"version {version} is incomplete: {len(self._waiting)} of {len(self._group_of)} tensors were not sent, "
                f"first {min(self._waiting)}."
            )
