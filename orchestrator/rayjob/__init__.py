"""Kubernetes: a command as a RayJob of KubeRay's, checked before it is handed in, and followed to its end."""
