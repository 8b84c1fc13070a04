"""Seating: which prompts stand beside which image, in a batch whose images may belong to different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..passes import Group, Visit


@dataclass(frozen=True, eq=False)
class Guest:
    """A group's prompts in one layer.

    Attributes:
        number: the group's number in the pass.
        tokens: ``(1 or images of the group, p, width)``.
        fresh: they are the layer's own.
        lives_on: something reads what they become.
    """

    number: int
    group: Group
    tokens: Tensor
    fresh: bool
    lives_on: bool


@dataclass(frozen=True, eq=False)
class Seating:
    """The prompts of all guests of a layer, and each image's places among them.

    Attributes:
        tokens: all prompts, ``(1 or num_images, p, width)`` for a single guest, else ``(1, total, width)``.
        places: ``(num_images, p)``, each image's prompts by their number in ``tokens``; None for a single guest.
        taken: ``(num_images, p)``, False where an image has fewer prompts than others; None where all have the same.
    """

    tokens: Tensor
    places: Tensor | None = None
    taken: Tensor | None = None

    @property
    def num_places(self) -> int:
        """Prompts beside each image, p."""
        return self.tokens.shape[1] if self.places is None else self.places.shape[1]

    def seat(self, heads: Tensor, num_images: int, num_windows: int) -> Tensor:
        """Queries, keys or values of all prompts, ``(1 or num_images, num_heads, total, head_dim)``, in every window
        of their image, as a view: ``(num_images, num_windows, num_heads, p, head_dim)``."""
        if self.places is not None:
            heads = heads[0][:, self.places].transpose(0, 1)
        return heads.unsqueeze(1).expand(num_images, num_windows, -1, -1, -1)


def find_guests(visit: Visit) -> list[Guest]:
    """The groups that have prompts in the layer that is being visited."""
    guests = []
    for number, (group, entered) in enumerate(zip(visit.of.groups, visit.entered, strict=True)):
        step = group.step(visit.layer.index)
        if step is None or group.prompts is None:
            continue
        num_images = visit.of.num_images if group.rows is None else len(group.rows)
        tokens = group.prompts(visit.layer.index, num_images) if step.fresh else entered
        assert tokens is not None  # the plan carries prompts only from where they are
        guests.append(Guest(number, group, visit.layer.place(tokens), step.fresh, step.route == "tokens"))
    return guests


def seat_guests(guests: Sequence[Guest], num_images: int) -> Seating:
    """Seats prompts beside their images."""
    first = guests[0]
    if first.group.rows is None:
        return Seating(first.tokens)
    width = max(guest.tokens.shape[1] for guest in guests)
    places = [[0] * width for _ in range(num_images)]
    taken = [[False] * width for _ in range(num_images)]
    total = 0
    for guest in guests:
        own, length = guest.tokens.shape[:2]
        for number, row in enumerate(guest.group.rows or ()):
            start = total + length * (number if own > 1 else 0)
            places[row][:length] = range(start, start + length)
            taken[row][:length] = [True] * length
        total += own * length
    device = first.tokens.device
    return Seating(
        torch.cat([guest.tokens.flatten(0, 1) for guest in guests]).unsqueeze(0),
        torch.tensor(places, device=device),
        None if all(map(all, taken)) else torch.tensor(taken, device=device),
    )
