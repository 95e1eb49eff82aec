"""Several Ray nodes on this machine, in a process of their own: it reads what to do with them from its input.

It prints the cluster's address, then answers each line with one of its own. The lines are add, remove ADDRESS, drain ADDRESS
SECONDS, and leave SECONDS, which does what this machine would do before it goes. Ray keeps its files below RAY_TMPDIR. With
`jobs` as an argument there is a job server, too, whose address it prints first; with a port Ray Client's server is there.
"""

import subprocess
import sys
import time
from pathlib import Path

import ray
import ray._raylet
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]
PREEMPTION = 2
"""Ray's DRAIN_NODE_REASON_PREEMPTION."""


def main() -> None:
    with_jobs = "jobs" in sys.argv
    dashboard = {"include_dashboard": with_jobs, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
    port = next((int(word) for word in sys.argv[1:] if word.isdecimal()), None)
    head = {"num_cpus": 0, "ray_client_server_port": port, **dashboard}
    cluster = Cluster(initialize_head=True, head_node_args=head, connect=True)
    nodes = {}
    if with_jobs:
        assert cluster.head_node
        print(f"jobs http://{cluster.head_node.webui_url}", flush=True)
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
            case ["leave", seconds]:
                leaving = subprocess.run(
                    [sys.executable, "-m", "orchestrator.cluster.leave", seconds], cwd=ROOT, check=False
                )
                print("left" if leaving.returncode == 0 else "stayed", flush=True)


if __name__ == "__main__":
    main()
