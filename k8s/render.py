"""Writes the overlays' RayJobs anew, with the words below: python k8s/render.py

They are what `launch/submit.py action=render` makes of these words; a test compares them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.submit import checked_job
from orchestrator.compose import compose
from orchestrator.rayjob.build import as_yaml
from orchestrator.schema import KubernetesCluster

OVERLAYS = Path(__file__).resolve().parent / "overlays"
_SECRETS = ("cluster.secrets.WANDB_API_KEY={name: wandb, key: api-key}",)
WORDS = {
    "one-node": ("recipe=chinese_llama", "stage=2", "cluster=kubernetes", *_SECRETS),
    "many-nodes": (
        "recipe=chinese_llama",
        "stage=2",
        "scale=7b",
        "cluster=kubernetes_8gpu",
        "cluster.nodes=1-4",
        "cluster.volumes.data={claim: corpus, path: /data, read_only: true}",
        "text=/data/text",
        "instructions=/data/instructions",
        *_SECRETS,
    ),
    "kueue": ("recipe=chinese_llama", "stage=2", "cluster=kubernetes", "cluster.queue=training", *_SECRETS),
    "object-store": (
        "recipe=chinese_llama",
        "stage=2",
        "cluster=kubernetes",
        "~cluster.volumes",
        "run_root=s3://my-bucket/runs",
        "cluster.secrets.AWS_ACCESS_KEY_ID={name: object-store, key: access-key-id}",
        "cluster.secrets.AWS_SECRET_ACCESS_KEY={name: object-store, key: secret-access-key}",
        *_SECRETS,
    ),
}
"""By overlay. `pvc` has no job of its own."""


def rendered(overlay: str) -> str:
    """The overlay's RayJob."""
    recipe = compose(WORDS[overlay])
    assert isinstance(recipe.cluster, KubernetesCluster)
    job = checked_job(recipe, recipe.cluster, WORDS[overlay])
    return f"# Made by k8s/render.py; change the words there.\n{as_yaml(job)}"


if __name__ == "__main__":
    for name in WORDS:
        (OVERLAYS / name / "rayjob.yaml").write_text(rendered(name), encoding="utf-8")
        print(f"k8s/overlays/{name}/rayjob.yaml")
