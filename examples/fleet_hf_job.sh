#!/bin/bash
# Scans or repairs an organization in a job of Hugging Face. Results are in a bucket, where the next job goes on from them.
#     examples/fleet_hf_job.sh ORG BUCKET scan|repair [OPTIONS OF bnbfix fleet]
set -euo pipefail
org=$1 bucket=$2 what=$3
hf jobs run --flavor cpu-upgrade --timeout 12h --secrets HF_TOKEN --volume "hf://buckets/$bucket:/results" \
  python:3.12 bash -uc '
    pip install --quiet "bnbfix[repair]" || exit
    cp "/results/fleet-$1.jsonl" .
    timeout --signal INT 11h bnbfix fleet "$1" --org "$0" "${@:2}"
    code=$?
    cp "fleet-$1.jsonl" "fleet-$1.html" /results
    exit $code' "$org" "$what" "${@:4}"
