"""Files that bring a run onto machines: image, compose, Ray clusters, Kubernetes, dashboards."""
