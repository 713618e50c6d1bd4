#!/usr/bin/env bash
# Installs SLURM, munge and ip from Debian's or Ubuntu's packages where they are missing; their services need not run.
set -euo pipefail
missing=()
for program in munged slurmctld slurmd sbatch ip; do
  PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || missing+=("$program")
done
if ((${#missing[@]} == 0)); then exit; fi
install=(apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge iproute2)
if ((EUID != 0)) || ! command -v apt-get > /dev/null; then
  echo "error: ${missing[*]} not found, which the tests on a cluster need; as root: ${install[*]}" >&2
  exit 1
fi
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive "${install[@]}"
