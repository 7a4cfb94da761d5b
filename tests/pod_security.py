"""The Pod Security Standard "restricted" (Kubernetes 1.37), as a namespace that enforces it checks a pod."""

from typing import Any

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def violations(pod: dict[str, Any]) -> list[str]:
    """What of a pod's specification the standard forbids; empty where it may run."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for volume in pod.get("volumes", []):
        found += [f"volume {volume['name']}: {kind}" for kind in volume if kind not in VOLUMES | {"name"}]
    own = pod.get("securityContext", {})
    found += [f"sysctl {entry['name']}" for entry in own.get("sysctls", []) if entry["name"] not in SYSCTLS]
    found += _of_a_context("pod", own)
    for container in [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]:
        context, name = container.get("securityContext", {}), container["name"]
        found += _of_a_context(name, context)
        found += [f"{name}: hostPort" for port in container.get("ports", []) if port.get("hostPort")]
        if context.get("privileged"):
            found.append(f"{name}: privileged")
        if context.get("procMount", "Default") != "Default":
            found.append(f"{name}: procMount")
        if context.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation")
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name}: capabilities")
        # A container's own setting goes before the pod's.
        if context.get("runAsNonRoot", own.get("runAsNonRoot")) is not True:
            found.append(f"{name}: runAsNonRoot")
        if "seccompProfile" not in context and "seccompProfile" not in own:
            found.append(f"{name}: seccompProfile")
    return found


def _of_a_context(name: str, context: dict[str, Any]) -> list[str]:
    selinux = context.get("seLinuxOptions", {})
    wrong = {
        "runAsUser": context.get("runAsUser") == 0,
        "hostProcess": context.get("windowsOptions", {}).get("hostProcess", False),
        "seLinuxOptions": selinux.get("type") not in SELINUX_TYPES or {"user", "role"} & set(selinux),
        "seccompProfile": context.get("seccompProfile", {}).get("type") not in (None, "RuntimeDefault", "Localhost"),
        "appArmorProfile": context.get("appArmorProfile", {}).get("type") not in (None, "RuntimeDefault", "Localhost"),
    }
    return [f"{name}: {field}" for field, is_wrong in wrong.items() if is_wrong]
