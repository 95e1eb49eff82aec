"""As many workers as fit the cluster and divide every batch, and what is said when none do."""

import pytest

from orchestrator.cluster.capacity import Capacity, Node, declared_capacity
from orchestrator.cluster.sizing import Size, allowed_numbers, check_precision, workers_for
from orchestrator.errors import RecipeError
from orchestrator.schema import AddressCluster, Cluster, KubernetesCluster, LocalCluster, Range, TrainStage

LAPTOP = Capacity((Node({"CPU": 4}),))
SERVER = Capacity((Node({"CPU": 32, "GPU": 8}),))
LOCAL = LocalCluster(kind="local")


def stage(global_batch_size: int, micro_batch_size: int = 4) -> TrainStage:
    values = {
        "kind": "train",
        "objective": "next_token",
        "modules_to_save": ["embed_tokens"],
        "block_length": 64,
        "global_batch_size": global_batch_size,
        "steps": 1,
        "learning_rate": 1e-4,
        "resources": {"micro_batch_size": micro_batch_size},
    }
    return TrainStage.model_validate(values)


def address(cpus_per_worker: int = 1) -> AddressCluster:
    return AddressCluster(kind="address", address="auto", cpus_per_worker=cpus_per_worker)


def problems(requested: int | Range | None, capacity: Capacity, cluster: Cluster, **stages: TrainStage) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        workers_for(requested, capacity, cluster, stages)
    return caught.value.problems


@pytest.mark.parametrize(
    ("capacity", "cluster", "size"),
    [
        (LAPTOP, LOCAL, Size(allowed=(4,), gpus=0, cpus=1)),
        (SERVER, LOCAL, Size(allowed=(8,), gpus=1, cpus=4)),
        (Capacity((Node({"CPU": 2, "GPU": 8}),)), LOCAL, Size(allowed=(2,), gpus=1, cpus=1)),
        (LAPTOP, address(cpus_per_worker=2), Size(allowed=(2,), gpus=0, cpus=2)),
        (SERVER, address(), Size(allowed=(8,), gpus=1, cpus=1)),
        (SERVER, address(cpus_per_worker=16), Size(allowed=(2,), gpus=1, cpus=16)),
    ],
)
def test_as_many_workers_as_fit_are_used(capacity: Capacity, cluster: Cluster, size: Size) -> None:
    assert workers_for(None, capacity, cluster, {"attention": stage(1024)}) == size


def test_a_run_without_training_stages_has_a_size() -> None:
    assert workers_for(None, LAPTOP, LOCAL, {}) == Size(allowed=(4,), gpus=0, cpus=1)


def test_no_more_workers_are_used_than_divide_every_batch() -> None:
    stages = {"attention": stage(48, micro_batch_size=2), "instruct": stage(40, micro_batch_size=2)}
    assert workers_for(None, SERVER, LOCAL, stages).allowed == (4,)
    assert workers_for(None, SERVER, LOCAL, {"attention": stage(4)}) == Size(allowed=(1,), gpus=1, cpus=32)


def test_workers_that_are_asked_for_share_the_cpus() -> None:
    assert workers_for(2, LAPTOP, LOCAL, {"attention": stage(16)}) == Size(allowed=(2,), gpus=0, cpus=2)


def test_more_workers_than_the_cluster_can_give_are_refused_with_what_it_has() -> None:
    assert problems(9, SERVER, LOCAL, attention=stage(1024)) == (
        "workers: 9 of {'CPU': 1, 'GPU': 1} are more than this cluster can give: 8 (8 GPUs and 32 CPUs on 1 nodes)",
    )
    (message,) = problems(None, LAPTOP, address(cpus_per_worker=8), attention=stage(16))
    assert message.endswith("this cluster can give: 0 (0 GPUs and 4 CPUs on 1 nodes)")


def test_a_range_leaves_the_numbers_that_divide_every_batch_and_shares_the_cpus_for_as_many_as_fit_now() -> None:
    stages = {"attention": stage(48), "instruct": stage(24)}
    assert workers_for(Range(fewest=1, most=8), LAPTOP, LOCAL, stages) == Size((1, 2, 3, 6), gpus=0, cpus=1)
    assert workers_for(Range(fewest=2, most=3), SERVER, LOCAL, stages) == Size((2, 3), gpus=1, cpus=10)


def test_a_range_of_which_no_number_divides_or_fits_is_refused() -> None:
    assert problems(Range(fewest=5, most=7), SERVER, LOCAL, attention=stage(32)) == (
        "stages.attention: global_batch_size 32 is not divisible by micro_batch_size 4 x 7 workers = 28",
    )
    (message,) = problems(Range(fewest=8, most=16), LAPTOP, LOCAL, attention=stage(64))
    assert message == "workers: 8 of {'CPU': 1} are more than this cluster can give: 4 (0 GPUs and 4 CPUs on 1 nodes)"


def test_half_precision_needs_a_gpu() -> None:
    on_cpu, on_gpu = (workers_for(None, capacity, LOCAL, {}) for capacity in (LAPTOP, SERVER))
    check_precision("fp16", on_gpu)
    check_precision("bf16", on_cpu)
    with pytest.raises(RecipeError) as caught:
        check_precision("fp16", on_cpu)
    assert str(caught.value) == "precision: fp16 trains on GPUs only, and this cluster has none; use bf16 or fp32"


def test_every_batch_that_does_not_divide_is_named_with_its_numbers() -> None:
    stages = {"embeddings": stage(24), "attention": stage(1000), "instruct": stage(1010, micro_batch_size=5)}
    assert problems(3, SERVER, LOCAL, **stages) == (
        "stages.attention: global_batch_size 1,000 is not divisible by micro_batch_size 4 x 3 workers = 12",
        "stages.instruct: global_batch_size 1,010 is not divisible by micro_batch_size 5 x 3 workers = 15",
    )
    assert allowed_numbers(2, {"attention": stages["attention"]}) == (2,)
    with pytest.raises(RecipeError, match="= 12"):
        allowed_numbers(3, {"attention": stages["attention"]})


def kubernetes(**settings: object) -> KubernetesCluster:
    return KubernetesCluster.model_validate({"kind": "kubernetes", "image": "image", **settings})


def test_where_workers_may_go_is_part_of_their_size() -> None:
    settings = {"accelerator_type": "H100", "resources": {"disk": 2}, "labels": {"pool": "new"}, "placement": "spread"}
    cluster = AddressCluster.model_validate({"kind": "address", "address": "auto", **settings})
    resources = {"CPU": 8, "GPU": 8, "accelerator_type:H100": 1, "disk": 4}
    capacity = Capacity((Node(resources, {"pool": "new"}), Node(resources, {"pool": "old"})))
    size = workers_for(2, capacity, cluster, {})
    assert size.bundle == {"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001, "disk": 2}
    assert (size.labels, size.placement) == ({"pool": "new"}, "spread")
    (message,) = problems(3, capacity, cluster)
    assert message.endswith("are more than this cluster can give: 2 (8 GPUs and 8 CPUs on 1 nodes labelled {'pool': 'new'})")


def test_nodes_that_are_not_selected_decide_nothing() -> None:
    cluster = AddressCluster(kind="address", address="auto", labels={"pool": "cpus"})
    capacity = Capacity((Node({"CPU": 8, "GPU": 8}, {"pool": "gpus"}), Node({"CPU": 6}, {"pool": "cpus"})))
    assert workers_for(None, capacity, cluster, {}) == Size((6,), gpus=0, cpus=1, labels={"pool": "cpus"})


def test_a_head_without_gpus_trains_nothing_where_others_have_some() -> None:
    capacity = Capacity((Node({"CPU": 64}), Node({"CPU": 8, "GPU": 4}), Node({"CPU": 8, "GPU": 4})))
    assert workers_for(None, capacity, address(), {}).allowed == (8,)
    assert workers_for(None, capacity, address(cpus_per_worker=4), {}).allowed == (4,)


def test_a_range_of_nodes_is_a_range_of_workers() -> None:
    cluster = kubernetes(nodes="1-4", gpus_per_node=8)
    size = workers_for(None, declared_capacity(cluster), cluster, {"attention": stage(1024)})
    assert size.allowed == (8, 16, 32)
    fixed = kubernetes(nodes=4, gpus_per_node=8)
    assert workers_for(None, declared_capacity(fixed), fixed, {"attention": stage(1024)}).allowed == (32,)
    assert workers_for(16, declared_capacity(cluster), cluster, {"attention": stage(1024)}).allowed == (16,)


def test_what_nodes_have_left_over_is_not_added_up() -> None:
    cluster = kubernetes(nodes=2, gpus_per_node=0, cpus_per_node=8, cpus_per_worker=3)
    assert workers_for(None, declared_capacity(cluster), cluster, {}).allowed == (4,)
    nodes = Capacity((Node({"CPU": 8}), Node({"CPU": 8}), Node({"CPU": 2})))
    assert workers_for(None, nodes, address(cpus_per_worker=3), {}).allowed == (4,)


def test_a_machine_gives_each_worker_as_many_cpus_as_it_must_have() -> None:
    cluster = LocalCluster(kind="local", cpus_per_worker=2)
    assert workers_for(None, LAPTOP, cluster, {}) == Size(allowed=(2,), gpus=0, cpus=2)
