"""What several devices add to a step: a model of communication, in seconds. Nothing here is measured.

Devices stand in nodes of `node`; within one they exchange `link` bytes per second, and between nodes each has `network`
(both one way). With n devices, m nodes and a buffer of S bytes:

    ring all-reduce      2 (n - 1)/n S/B + 2 (n - 1) a           each device sends and receives 2 S (n - 1)/n
    tree all-reduce      2 S/B + 2 ceil(log2 n) a                two trees, pipelined (Sanders et al. 2009)
    gather, scatter      (n - 1)/n S/B + (n - 1) a               of FSDP: all-gather, reduce-scatter

where B is the bandwidth and a the latency of a message. Over nodes: scatter within the node, reduce the node's share
S/node between nodes (by ring or tree, whichever is faster), gather within the node; likewise for gather and scatter.

Overlap. Gradients are sent, and FSDP's weights are fetched, layer by layer while others are computed. Two chains of L
equal stages of which each waits for the other's take max(x, y) + min(x, y)/L.
"""

import math
from dataclasses import dataclass

LATENCIES = {"link": 5e-6, "network": 20e-6}  # seconds of a message; assumed


@dataclass(frozen=True)
class Network:
    """Devices in nodes, and the bandwidths between them in bytes per second, one way."""

    devices: int
    node: int
    link: float
    network: float

    @property
    def inside(self) -> int:
        """Devices that share a node."""
        return min(self.devices, self.node)

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.node)

    def all_reduce(self, size: float) -> float:
        """Seconds to add up a buffer of `size` bytes of each device, and give all of them the sum."""
        within = 2 * chain(self.inside, size, self.link, LATENCIES["link"])
        share = size / self.inside
        latency = LATENCIES["network"]
        return within + min(
            ring(self.nodes, share, self.network, latency), tree(self.nodes, share, self.network, latency)
        )

    def gather(self, size: float) -> float:
        """Seconds until each device has a buffer of `size` bytes of which each held a part; the same to scatter one."""
        within = chain(self.inside, size, self.link, LATENCIES["link"])
        return within + chain(self.nodes, size / self.inside, self.network, LATENCIES["network"])


def ring(n: int, size: float, bandwidth: float, latency: float) -> float:
    """All-reduce by a ring: a scatter and a gather."""
    return 2 * chain(n, size, bandwidth, latency)


def tree(n: int, size: float, bandwidth: float, latency: float) -> float:
    """All-reduce by two pipelined trees."""
    return 0.0 if n == 1 else 2 * size / bandwidth + 2 * math.ceil(math.log2(n)) * latency


def chain(n: int, size: float, bandwidth: float, latency: float) -> float:
    """All-gather or reduce-scatter by a ring."""
    return 0.0 if n == 1 else (n - 1) / n * size / bandwidth + (n - 1) * latency


def overlapped(compute: float, communicate: float, stages: int) -> float:
    """Seconds of both together, in so many stages."""
    return max(compute, communicate) + min(compute, communicate) / stages


def ddp_seconds(network: Network, compute: float, accumulation: int, parameters: int, layers: int) -> float:
    """A step with all weights on each device: float32 gradients are added up behind the last pass's backward.

    Args:
        compute: seconds of the passes of a step, of which backward is two thirds.
    """
    backward = compute / accumulation * 2 / 3
    return compute - backward + overlapped(backward, network.all_reduce(4.0 * parameters), layers)


def fsdp_seconds(
    network: Network, compute: float, accumulation: int, parameters: int, layers: int, weight_bytes: int
) -> float:
    """A step with weights, gradients and optimizer state in parts (Rajbhandari et al. 2020, stage 3).

    Each pass gathers the weights (`weight_bytes` each) for forward and again for backward; the last one scatters
    float32 gradients.
    """
    weights = network.gather(float(weight_bytes) * parameters)
    forward, backward = compute / accumulation / 3, compute / accumulation * 2 / 3
    passes = accumulation * overlapped(forward, weights, layers) + (accumulation - 1) * overlapped(
        backward, weights, layers
    )
    return passes + overlapped(backward, weights + network.gather(4.0 * parameters), layers)
