"""Several Ray nodes on this machine, in a process of their own: it reads what to do with them from its input.

It prints the cluster's address, then answers each line with one of its own. The lines are add, remove ADDRESS, and
drain ADDRESS SECONDS. Ray keeps its files below RAY_TMPDIR.
"""

import sys
import time

import ray
import ray._raylet
from ray.cluster_utils import Cluster

PREEMPTION = 2
"""Ray's DRAIN_NODE_REASON_PREEMPTION."""


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, connect=True)
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                # Ranks are grouped by node, and named by its address, so each needs its own.
                address = f"127.0.0.{len(nodes) + 2}"
                nodes[address] = cluster.add_node(num_cpus=1, node_ip_address=address)
                print(address, flush=True)
            case ["remove", address]:
                cluster.remove_node(nodes[address], allow_graceful=False)
                print("removed", flush=True)
            case ["drain", address, seconds]:
                alive = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
                deadline = int((time.time() + float(seconds)) * 1000)
                client = getattr(ray._raylet, "GcsClient")  # noqa: B009  compiled, and unknown to the type checker
                accepted, reason = client(cluster.address).drain_node(alive[address], PREEMPTION, "wanted", deadline)
                print("draining" if accepted else reason, flush=True)


if __name__ == "__main__":
    main()
