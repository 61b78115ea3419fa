#!/usr/bin/env bash
# Submit a run to the Ray cluster that RAY_API_SERVER_ADDRESS names, and follow it; the exit code is `ray job submit`'s.
# Submitted again, the run goes on from its newest checkpoint. The driver runs on the head, or where DRIVER_RESOURCES has its place.
set -euo pipefail

usage="usage: deploy/cluster/submit.sh RECIPE OUTPUT_DIR [--section.key VALUE ...]"

refuse() {
    printf 'submit.sh: %s\n' "$1" >&2
    exit 2
}

[ $# -ge 2 ] || refuse "$usage"
recipe=$1
output_dir=$2
shift 2

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -f "$recipe" ] || refuse "there is no recipe at $recipe, seen from $PWD, which is what is uploaded"
case $recipe in
/* | ../*) refuse "the recipe $recipe must lie inside $PWD, which is what is uploaded, and be named from there" ;;
esac
case $output_dir in
/* | *://*) ;;
*) refuse "OUTPUT_DIR is $output_dir: give an absolute path on storage that all nodes see, or a URI (s3://...)" ;;
esac
command -v ray > /dev/null || refuse "there is no ray on the PATH: put .venv/bin on it, which 'make demo' makes"

# Ray would refuse a large upload only after all of it was sent, with a traceback.
python=$(dirname "$(command -v ray)")/python
[ -x "$python" ] || python=python3
"$python" deploy/cluster/upload_size.py

# The run's name and rounds are in the recipe's head, before its first table, unless an override says otherwise.
name=$(sed -n '/^\[/q; s/^name *= *"\([^"]*\)".*/\1/p' "$recipe")
rounds=$(sed -n '/^\[/q; s/^rounds *= *\([0-9]*\).*/\1/p' "$recipe")
previous=
for word in "$@"; do
    case $previous in --name) name=$word ;; --rounds) rounds=$word ;; esac
    case $word in --name=*) name=${word#--name=} ;; --rounds=*) rounds=${word#--rounds=} ;; esac
    previous=$word
done
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || refuse "the run's name is '$name': $recipe needs a line like name = \"demo\""

# What the dashboard shows of the job: job_name in its list, all of it on the job's page.
folder=${output_dir%/}/$name
case $folder$rounds in *[\"\\[:cntrl:]]*) refuse "OUTPUT_DIR or --rounds has a quote, a backslash or a control character" ;; esac
metadata="{\"job_name\": \"$name\", \"rounds\": \"$rounds\", \"folder\": \"$folder\", \"report\": \"$folder/report/report.html\"}"
submission=$name-$(date -u +%Y%m%d-%H%M%S)

# Both sides have to agree that a token is asked for.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"

# Sixty seconds for the last completed round to be committed after `ray job stop`; Ray's own three are short for large weights.
exec ray job submit \
    --submission-id "$submission" \
    --working-dir . \
    --metadata-json "$metadata" \
    ${DRIVER_RESOURCES:+--entrypoint-resources "$DRIVER_RESOURCES"} \
    --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}' \
    -- python -m ray_ddpo train "$recipe" --output_dir "$output_dir" --resume auto "$@"
