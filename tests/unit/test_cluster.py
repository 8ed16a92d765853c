"""Cluster profiles: strict, shown as tables, and registered by a command that can be read first."""

import json
from pathlib import Path

import pytest

from controlllm.cli import main
from controlllm.config.cluster import PROFILES, check_processes, load_profile, profile_names
from controlllm.errors import UserError
from controlllm.register import registered_version, registration

ALL = ["local", "multi-node", "one-gpu", "one-node-8", "spot", "two-processes"]
IMAGES = [f"{name}=registry.example/{name}:1" for name in ("cpu", "train", "serve")]


@pytest.fixture
def mine(tmp_path):
    """Writes a profile of one's own, made of another by replacing text."""

    def write(base: str, old: str, new: str) -> str:
        text = (PROFILES / f"{base}.yaml").read_text()
        assert old in text
        file = tmp_path / "mine.yaml"
        file.write_text(text.replace(old, new, 1))
        return str(file)

    return write


def test_profiles_that_the_documents_name_exist():
    assert profile_names() == ALL


@pytest.mark.parametrize(("base", "old", "new", "said"), [
    ("local", "light:", "nodez: 2\nlight:", r"mine\.yaml:2: unknown key 'nodez'"),
    ("local", "  nodes: 1", "  nodez: 1", r"mine\.yaml:5: unknown key 'train.nodez'; did you mean 'nodes'\?"),
    ("local", "cpu: \"1\"", "cpus: \"1\"", r"mine\.yaml:2: unknown key 'light.cpus'; did you mean 'cpu'\?"),
    ("local", "light:", "name: x\nlight:", r"mine\.yaml:2: unknown key 'name': a profile is named by its file"),
    ("local", "nodes: 1", "nodes: two", r"mine\.yaml:5: train.nodes: must be a whole number, found 'two'"),
    ("local", "memory: 4Gi", "memory: 4 GB", r"mine\.yaml:2: light.memory: "),
    ("local", "  nodes: 1", "  nodes: 2", r"cache must be a folder of a volume .* since train.nodes is 2"),
    ("one-gpu", "cache: /cache", "cache: /elsewhere", r"cache '/elsewhere' lies on none of volumes"),
    ("spot", "cache: /cache\n", "", r"since train.interruptible is true"),
    ("one-gpu", ", claim: controlllm-cache", "", r"name cache needs one of claim, nfs and config_map, found 0"),
    ("two-processes", "OMP_NUM_THREADS: \"1\"", "HF_TOKEN: hf_1234", r"env\.HF_TOKEN holds a secret: name the Secret"),
    ("one-gpu", "expandable_segments:True", "1\", AWS_SECRET_ACCESS_KEY: \"x", r"env\.AWS_SECRET_ACCESS_KEY holds a"),
])  # fmt: skip
def test_a_mistake_in_a_profile_is_one_line(mine, base, old, new, said):
    with pytest.raises(UserError, match=said) as raised:
        load_profile(mine(base, old, new))
    assert "\n" not in str(raised.value)


def test_an_unknown_profile_names_the_known(monkeypatch):
    monkeypatch.setenv("CONTROLLLM_PROFILE", "gpu")
    with pytest.raises(UserError, match=f"'gpu' is no cluster profile; known: {', '.join(ALL)}, or the path"):
        load_profile()


@pytest.mark.parametrize("name", ALL)
def test_a_pod_reads_what_it_is_handed(name):
    profile = load_profile(name)
    assert load_profile(profile.model_dump_json(exclude_defaults=True)) == profile


def test_a_launcher_of_another_size_is_told(monkeypatch):
    monkeypatch.setenv("CONTROLLLM_PROFILE", "multi-node")
    check_processes(16)
    with pytest.raises(UserError, match=r"profile multi-node: 2 nodes × 8 processes need WORLD_SIZE 16, but .* is 8;"):
        check_processes(8)
    monkeypatch.delenv("CONTROLLLM_PROFILE")
    check_processes(8)


def test_training_in_another_number_of_processes_is_refused(recipe, store, monkeypatch, capsys):
    monkeypatch.setenv("CONTROLLLM_PROFILE", "two-processes")
    assert main(["train", str(recipe)]) == 1
    assert "1 nodes × 2 processes need WORLD_SIZE 2, but WORLD_SIZE is 1" in capsys.readouterr().err


def test_shards_that_do_not_fit_the_profile_are_refused_before_a_run(recipe, store, monkeypatch, capsys):
    monkeypatch.setenv("CONTROLLLM_PROFILE", "two-processes")
    assert main(["config", "check", str(recipe), "train.parallel={kind: fsdp, shards: 4}"]) == 1
    said = capsys.readouterr().err
    assert "train.parallel: 1 replicas × 4 shards need 4 processes, but there are 2 in profile two-processes" in said
    assert said.count("\n") == 1
    assert main(["config", "check", str(recipe), "train.parallel={kind: fsdp, shards: 2}"]) == 0


# Commands


def test_the_table_says_what_each_task_asks_for(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["cluster", "show", "--profile", "multi-node"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for word in ("train", "64", "512Gi", "8 NVIDIA-H100-80GB-HBM3", "6", "240", "controlllm"):
        assert word in lines["train"]
    assert "2 nodes × 8 processes, as a PyTorchJob" in lines["training"]
    assert "serve" in lines["smoke"]
    assert "–" in lines["prepare_piece"]
    assert lines["secrets"].split()[1:] == ["AWS_ACCESS_KEY_ID,", "AWS_SECRET_ACCESS_KEY,", "HF_TOKEN"]


def test_profiles_are_listed_with_their_size(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["cluster", "profiles"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ALL)
    assert "2 nodes × 8 processes" in out


def test_registration_is_one_readable_command():
    made = registration(
        load_profile("multi-node"), "multi-node", version="7", images=IMAGES, project="p", domain="development"
    )
    assert str(made) == (
        "CONTROLLLM_PROFILE=multi-node pyflyte register --copy none --version 7-multi-node --project p --domain "
        "development --service-account controlllm --image cpu=registry.example/cpu:1 --image "
        "train=registry.example/train:1 --image serve=registry.example/serve:1 workflows"
    )


def test_two_profiles_never_register_one_version():
    assert len({registered_version("1", load_profile(name)) for name in ALL}) == len(ALL)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--profile", "one-gpu", "--version", "1"], "--image cpu=... is missing: the light, data pods of one-gpu run"),
    (["--profile", "local", "--version", "1", "--image", "cpu"], "--image: must be NAME=REFERENCE"),
    (["--profile", "local", "--version", "1", "--image", "cpu=x", "--image", "gpu=y"], "--image gpu: no pod of local"),
    (["--profile", "local", "--version", "a b", "--image", "cpu=x"], "--version: must be letters"),
    (["--profile", "nowhere", "--version", "1"], "'nowhere' is no cluster profile"),
    (["--version", "1"], "--profile: name the cluster"),
])  # fmt: skip
def test_mistakes_of_registration_are_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.delenv("CONTROLLLM_PROFILE", raising=False)
    assert main(["cluster", "register", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_profile_of_ones_own_is_handed_on_by_its_path(mine, monkeypatch, capfd, tmp_path):
    """pyflyte itself is real and fails at once: there is nothing to register in its folder."""
    file = mine("local", 'cpu: "1"', 'cpu: "3"')
    monkeypatch.setattr("controlllm.register.ROOT", tmp_path)
    monkeypatch.chdir(Path(file).parent)
    assert main(["cluster", "register", "--profile", "mine.yaml", "--version", "1", "--image", "cpu=a/b:1"]) == 1
    out = capfd.readouterr()
    assert f"CONTROLLLM_PROFILE={file} pyflyte register" in out.out
    assert "pyflyte register ended with exit code" in out.err


@pytest.mark.slow
def test_everything_can_be_registered_under_a_profile(capfd):
    images = [word for image in IMAGES for word in ("--image", image)]
    assert main(["cluster", "register", "--profile", "spot", "--version", "1", "--dry-run", *images]) == 0
    said = capfd.readouterr()
    assert "tasks.train.train (Dry run Mode)" in (said.out + said.err).replace("\n", " ")


def test_the_profile_that_pods_get_holds_no_image(monkeypatch):
    """Flyte would take {{...}} in an environment for something of its own."""
    from tasks import cluster

    cluster.profile.cache_clear()
    monkeypatch.setenv("CONTROLLLM_PROFILE", "multi-node")
    told = cluster.runs("train")
    cluster.profile.cache_clear()
    assert told["container_image"] == "{{.image.train.fqn}}:{{.image.train.version}}"
    assert "{{" not in json.dumps(told["environment"])
