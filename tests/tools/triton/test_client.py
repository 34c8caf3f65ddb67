import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from edm_deploy import load_pipeline
from edm_deploy.errors import InputError
from edm_deploy_tools.triton.client import infer
from edm_deploy_tools.triton.repository import write_repository
from edm_deploy_tools.triton.served_pipeline import arguments, pixels

VARIABLE = "EDM_DEPLOY_PYTRITON"  # the site-packages directory of an environment with nvidia-pytriton


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+ cannot be reached: .* Start tritonserver"):
        infer(f"http://127.0.0.1:{free_port()}", "d", {})


@pytest.mark.extended
@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no environment with nvidia-pytriton, whose server is used")
def test_tritonserver_serves_the_pictures_of_our_runtime(chain, tmp_path):
    """Its Python backend only: nvidia-pytriton has no other. The server's own check of the config is part of the test."""
    write_repository(chain.engine, tmp_path / "models", name="unet", backend=None)
    packages, port = Path(os.environ[VARIABLE]), free_port()
    home = packages / "pytriton" / "tritonserver"
    shutil.copytree(home / "backends", tmp_path / "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", tmp_path / "backends/python")
    path = os.pathsep.join([str(Path(__file__).parents[3]), sysconfig.get_paths()["purelib"]])
    environment = os.environ | {"LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"), "PYTHONPATH": path}
    options = [
        "--model-control-mode=explicit",
        "--load-model=unet_pipeline",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    paths = [f"--model-repository={tmp_path / 'models'}", f"--backend-directory={tmp_path / 'backends'}"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([home / "bin/tritonserver", *paths, *options], env=environment, stdout=log, stderr=log)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while not ready(url):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        inputs = {"seed": np.array([3, 4]), "steps": np.array([2], np.int32)}
        images = infer(url, "unet_pipeline", inputs)["images"]
        pipeline = load_pipeline(chain.engine)
        assert np.array_equal(images, pixels(pipeline(**arguments(pipeline, inputs)).images))
        with pytest.raises(InputError, match="refused the request: DDIMScheduler cannot sample in 2000 steps"):
            infer(url, "unet_pipeline", {"steps": np.array([2000], np.int32)})
        assert infer(url, "unet_pipeline", inputs)["images"].shape == images.shape  # after an error too
    finally:
        server.terminate()
        server.wait(30)


def ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).status == 200
    except OSError:
        return False
