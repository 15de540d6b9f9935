"""cluster/serve.yaml, read by Serve's own schema, is the application that `segcore serve` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from segcore.errors import ConfigError
from services.serving.app import APPLICATION, build
from services.serving.config import ServeConfig

FILE = Path(__file__).parents[2] / "cluster" / "serve.yaml"


@pytest.fixture
def schema() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))


def deployments(application: Any) -> dict[str, Any]:
    """What Serve would deploy, by name: class, settings, resources, arguments."""
    built = build_app(application, name=APPLICATION, make_deployment_handle=lambda deployment, app: deployment.name)
    return {
        deployment.name: (
            deployment.func_or_class,
            deployment._deployment_config,
            deployment.ray_actor_options,
            deployment.init_args,
        )
        for deployment in built.deployments
    }


def test_it_is_the_application_that_segcore_serve_runs(schema):
    (application,) = schema.applications
    config = ServeConfig(**application.args)
    from_file = call_user_app_builder_with_args_if_necessary(import_attr(application.import_path), application.args)
    assert deployments(from_file) == deployments(build(config))
    assert config.replicas > 1


def test_its_name_and_ports_are_those_of_segcore_serve(schema):
    (application,) = schema.applications
    config, plain = ServeConfig(**application.args), ServeConfig()
    assert application.name == APPLICATION
    assert (config.grpc_port, config.http_port) == (plain.grpc_port, plain.http_port)
    assert not application.deployments  # what is deployed is the application's own matter


def test_the_network_reaches_fronts_alone_by_tls_and_with_a_token(schema):
    (application,) = schema.applications
    config = ServeConfig(**application.args)
    assert config.tls_certificate
    assert config.tenants
    assert schema.http_options.host == "127.0.0.1"
    assert not schema.grpc_options.grpc_servicer_functions


def test_a_misspelt_setting_is_refused(schema):
    (application,) = schema.applications
    builder = import_attr(application.import_path)
    with pytest.raises(ValueError, match="replicass"):
        call_user_app_builder_with_args_if_necessary(builder, {"replicass": 2})


def test_passwords_come_from_a_file_on_the_engines(tmp_path):
    file = tmp_path / "password"
    file.write_text("p@ss/word\\1\n")
    config = ServeConfig(sessions="redis://redis:6379/1", past_shared="rediss://u:p@other:1/0", redis_password=file)
    assert config.with_password().sessions == "redis://:p%40ss%2Fword%5C1@redis:6379/1"
    assert config.with_password().past_shared == config.past_shared
    assert ServeConfig(sessions="/a/file", redis_password=file).with_password().sessions == "/a/file"
    file.unlink()
    with pytest.raises(ConfigError, match="redis_password"):
        config.with_password()
