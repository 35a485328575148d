"""What may overlap with what in a step, in one place: the simulator, the balanced policy and the ceilings use it.

A step is `num_layers` equal layers, each dense work (projections, MLP, norms) and then attention. The rules and their
reasons (design, section 1):

1. A layer's host KV can be read *in place* only inside that layer's attention: the query it is multiplied with does
   not exist earlier. Attention therefore lasts max(HBM time, link time of the in-place reads).
2. A *copy ahead* needs no query, so it may use the whole step: it is issued `lead` layers early and queues on the link
   in order. In-place reads have the link to themselves while they last, so copies get what is left of the layer. A
   copied byte is also written to HBM, which slows the dense work by its bytes over the HBM rate, and is read from HBM
   in attention like any device byte. Copies of the next step's first `lead` layers are issued near the end of this
   one, so that the link has no gap between steps.
3. KV written to the host leaves on the other direction of the link and overlaps with everything, until it is longer
   than the layer. While both directions are busy each runs at its duplex share.
4. A swap moves whole sequences before layer 0, because the freed blocks are reused by, and the returned ones read in,
   that very step: nothing overlaps with it.
5. A page fault stalls the kernel that raised it, and the driver serves fetch and eviction one after the other
   (Nixie, OSDI'26: they never overlap): fault time is added, and copies continue meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from uvm_kv.types import Reach


@dataclass(slots=True)
class LayerWork:
    """One layer of a step, in seconds. Every layer of a step does the same."""

    dense_s: float
    attention_s: float
    in_place_s: float = 0.0
    """Link time of the host KV read in place."""
    write_s: float = 0.0
    """Link time, device to host, of new KV whose block lies on the host."""
    copy_s: float = 0.0
    """Link time of the host KV copied ahead."""
    copy_write_s: float = 0.0
    """HBM time of writing the copied bytes."""

    @property
    def busy_s(self) -> float:
        """The layer as it would be if every link transfer were free."""
        return self.dense_s + self.copy_write_s + self.attention_s


@dataclass(slots=True)
class CopyQueue:
    """Copies issued for layers that have not run yet, carried from one step into the next."""

    copy_s: float = 0.0
    """Link time per layer, of each of the next step's first `lead` layers."""
    done_s: float = 0.0
    """Part of their link time that has already passed."""


def duplex(h2d_s: float, d2h_s: float, share_h2d: float, share_d2h: float) -> tuple[float, float]:
    """Stretch two transfers in opposite directions that start together; the longer one finishes alone."""
    if h2d_s == 0.0 or d2h_s == 0.0:
        return h2d_s, d2h_s
    h2d_full, d2h_full = h2d_s / share_h2d, d2h_s / share_d2h
    if h2d_full <= d2h_full:
        return h2d_full, h2d_full + (d2h_s - h2d_full * share_d2h)
    return d2h_full + (h2d_s - d2h_full * share_h2d), d2h_full


def run_layers(num_layers: int, work: LayerWork, lead: int, queue: CopyQueue) -> tuple[float, float]:
    """Time of all layers of a step and the part of it that compute waited for the link, in seconds.

    `queue` holds the copies that the previous step issued for this one's first `lead` layers, and on return those
    that this step issued for the next. Copies of layer l are issued as layer l - lead starts.
    """
    busy = work.busy_s
    layer = work.dense_s + work.copy_write_s + max(work.attention_s, work.in_place_s)
    layer = max(layer, work.write_s)
    copy = work.copy_s
    if copy == 0.0 and queue.copy_s == 0.0:
        return num_layers * layer, num_layers * (layer - busy)
    link_free = layer - work.in_place_s
    carried = queue.copy_s
    issued, needed, done, waited = carried * lead, 0.0, queue.done_s, 0.0
    for index in range(num_layers):
        issued += copy
        needed += carried if index < lead else copy
        if done < needed:
            waited += needed - done
            done = needed
        done = min(issued, done + link_free)
    queue.copy_s, queue.done_s = copy, done - needed
    return num_layers * layer + waited, num_layers * (layer - busy) + waited


def ceiling(
    reach: Reach,
    *,
    step_s: float,
    attention_s: float,
    kv_bytes: float,
    link_bytes_per_s: float,
    hbm_bytes_per_s: float,
) -> float:
    """Closed-form bound on the gain over device-only decoding, as a fraction (design, section 1).

    `step_s` and its part `attention_s` are those of a device-only step that reads `kv_bytes` of KV in use. The link
    may carry BW_link * (its share of the step); a copied byte costs 2 / BW_hbm of step time. Where the KV in use is
    smaller still than what the link moves in a step, even in-place reads that nothing hides pay: with more and more of
    them the step becomes H / BW_link, and the gain tends to BW_link * t / C - 1.
    """
    copied_whole_step = link_bytes_per_s * step_s / kv_bytes
    in_place = max(link_bytes_per_s * attention_s / kv_bytes, copied_whole_step - 1)
    copy_cost = 2 * link_bytes_per_s / hbm_bytes_per_s
    match reach:
        case Reach.IN_PLACE:
            return in_place
        case Reach.COPY_AHEAD:
            return max(0.0, copied_whole_step - copy_cost)
        case Reach.BOTH:
            both = copied_whole_step - copy_cost * (1 - attention_s / step_s)
            return max(in_place, both)
