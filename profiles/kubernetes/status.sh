#!/bin/sh
# What Snakemake asks about a job: success, failed or running. One that somebody deleted has failed; where the cluster does not answer, kubectl says why
# and Snakemake asks again, because a run shall not end with the connection.
conditions='{range .status.conditions[?(@.status=="True")]} {.type}{end}'
found=$(kubectl get job "$1" --ignore-not-found --request-timeout 30s --output "jsonpath={.metadata.name}$conditions ") || { echo running; exit; }
case $found in
    "" | *" Failed "*) echo failed ;;
    *" Complete "*) echo success ;;
    *) echo running ;;
esac
