"""One model served by several processes or machines: replicas on a Ray cluster, behind one ingress of ours."""
