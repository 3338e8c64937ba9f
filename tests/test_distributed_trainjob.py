"""examples/trainjob.yaml has the fields of the TrainJob CRD, and its command trains under Trainer's variables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import PATIENCE, environment, last_checkpoint
from nodes import free_port

JOB = yaml.safe_load((Path(__file__).parent.parent / "examples/trainjob.yaml").read_text(encoding="utf-8"))

# trainer.kubeflow.org/v1alpha1 as of Trainer 2.3: a field's type, or the fields of an object or of a list's elements.
ENV = [{"name": str, "value": str}]
POD = {
    "terminationGracePeriodSeconds": int,
    "containers": [{"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
REPLICATED = [{"name": str, "template": {"spec": {"template": {"spec": POD}}}}]
CRD = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "runtimeRef": {"name": str, "apiGroup": str, "kind": str},
        "trainer": {
            "image": str,
            "numNodes": int,
            "numProcPerNode": int,
            "command": [str],
            "args": [str],
            "env": ENV,
            "resourcesPerNode": {"requests": dict, "limits": dict},
        },
        "runtimePatches": [
            {"manager": str, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": REPLICATED}}}}
        ],
    },
}


def wrong(value, fields, where="job"):
    """Where a document has a field or a type that its definition does not have."""
    if isinstance(fields, dict) and isinstance(value, dict):
        unknown = [f"{where}.{name}" for name in value.keys() - fields.keys()]
        return unknown + [w for name in value.keys() & fields.keys() for w in wrong(value[name], fields[name], name)]
    if isinstance(fields, list) and isinstance(value, list):
        return [w for element in value for w in wrong(element, fields[0], where)]
    return [] if isinstance(fields, type) and type(value) is fields else [where]


def test_the_job_has_the_fields_of_the_crd():
    assert (JOB["apiVersion"], JOB["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert wrong(JOB, CRD) == []
    assert wrong({"spec": {"trainer": {"numNodes": "2"}, "podTemplateOverrides": []}}, CRD) == [
        "spec.podTemplateOverrides",
        "numNodes",
    ]
    (patch,) = JOB["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    grace = {variable["name"]: variable["value"] for variable in JOB["spec"]["trainer"]["env"]}
    assert int(grace["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["name"] == pod["volumes"][0]["name"]
    assert f"{mount['mountPath']}/runs" in JOB["spec"]["trainer"]["command"][2]


@pytest.mark.slow
def test_its_command_trains(tmp_path):
    """With the variables that Trainer's torch plugin sets, on one node of one process."""
    trainer = JOB["spec"]["trainer"]
    command = [word.replace("/shared", str(tmp_path)) for word in trainer["command"]]
    (tmp_path / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    pod = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "0"}
    pod |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port()), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    pod |= {variable["name"]: variable["value"] for variable in trainer["env"]}
    arguments = ["--data=synthetic:40,2,8", "--model=small_cnn", "--batch-size=20", "--max-steps=4"]
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment(**pod), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/dlb-imagenet"
    assert (run / "result.json").exists() and last_checkpoint(run)["step"] == 4
