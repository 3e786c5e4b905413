"""How far domains are apart in their experts, from the counts that OLMoE's authors published of OLMoE and Mixtral.

The counts are those of github.com/allenai/OLMoE, scripts/routing_output (about 205,000 tokens a domain, layers 0, 7 and
15), as JSON: expert_counts[domain][i][e] of layers[i]. Printed, by layer: the mean over domains of the Jensen-Shannon
divergence between a domain's share of the experts and the average share, in bits. "tulu" is left out: Mixtral's counts
have no such domain.

    python benchmarks/domain_divergence.py FILE.json ... [--json]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moesaic.telemetry.inspection.measures import divergence_from_average

LEFT_OUT = ("tulu",)


def measure(path: Path) -> dict[str, Any]:
    """The divergences of one file, by layer."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    domains = [name for name in tree["expert_counts"] if name not in LEFT_OUT]
    found = {
        layer: divergence_from_average([tree["expert_counts"][name][at] for name in domains])
        for at, layer in enumerate(tree["layers"])
    }
    return {"model": tree["model"], "domains": domains, "bits": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    measured = [measure(path) for path in args.files]
    if args.json:
        print(json.dumps(measured, indent=2))
        return
    for each in measured:
        layers = ", ".join(f"{bits:.4f} at layer {layer}" for layer, bits in each["bits"].items())
        print(f"{each['model']}, {len(each['domains'])} domains: {layers}")


if __name__ == "__main__":
    main()
