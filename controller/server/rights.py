"""Who may do what: a role for every call, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.protos.errors import PermissionDenied

Role = Literal["user", "admin"]
ROLES: tuple[Role, ...] = ("user", "admin")
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls."""

    tenant: str
    role: Role


ANYONE = Caller(DEFAULT_TENANT, "admin")
"""Where nothing asks who calls."""

OWN = "/phalanx.v1.InferenceService/"
ADMIN = "/phalanx.v1.AdminService/"
RIGHTS: dict[str, Role] = {
    OWN + "Generate": "user",
    OWN + "Chat": "user",
    OWN + "Resume": "user",
    OWN + "Tokenize": "user",
    OWN + "Detokenize": "user",
    OWN + "Abort": "user",
    OWN + "GetModelInfo": "user",
    OWN + "ExplainPlacement": "user",
    OWN + "GetClusterState": "admin",
    ADMIN + "RestartReplicas": "admin",
    ADMIN + "ScaleReplicas": "admin",
}
"""Calls of our services. One that is not here is an administrator's."""


def check_right(method: str, caller: Caller) -> None:
    """Raises `PermissionDenied` where the caller's role may not call `method`, "/service/Call".

    Every call of other services (Open Inference Protocol, vLLM engine, reflection) is a user's:
    none of them governs the cluster.
    """
    needed = RIGHTS.get(method, "admin") if method.startswith((OWN, ADMIN)) else "user"
    if needed == "admin" and caller.role != "admin":
        name = method.rpartition("/")[2]
        raise PermissionDenied(f"{name} is for operators; this token has the role user")
