#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests: controller, node and munge on the loopback, all state in one folder.
#   sudo tests/slurm/cluster.sh start FOLDER
#   sudo tests/slurm/cluster.sh stop FOLDER
# Needs root, Debian's packages slurm-wlm and munge, and a machine that has no Slurm of its own: /etc/slurm is linked to the folder,
# because jobs look there. Without accounting: `squeue` alone knows the jobs. The node has two made-up GPUs.
set -euo pipefail

action=${1:?start or stop} folder=$(realpath -m "${2:?a folder for its state}")
cores=$(nproc) memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024))
node=$(hostname -s)

start() {
    [ ! -e /etc/slurm/slurm.conf ] || { echo "error: /etc/slurm/slurm.conf exists: this machine has a Slurm" >&2; exit 1; }
    mkdir -p "$folder"/{controller,node,logs}
    if [ ! -S /run/munge/munge.socket.2 ]; then
        [ -s /etc/munge/munge.key ] || { head -c 1024 /dev/urandom > /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
        chown munge: /etc/munge/munge.key
        install -d -o munge -g munge /run/munge
        runuser -u munge -- munged
    fi
    # the accounting of jobs sees that one takes more memory than it asked for
    cat > "$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
StateSaveLocation=$folder/controller
SlurmdSpoolDir=$folder/node
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/logs/slurmctld.log
SlurmdLogFile=$folder/logs/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
KillWait=2
GresTypes=gpu
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    # a GPU wants a device, and these two are on every machine, while a container may be forbidden to make one
    cat > "$folder/gres.conf" <<END
NodeName=$node Name=gpu File=/dev/null
NodeName=$node Name=gpu File=/dev/zero
END
    install -d /etc/slurm
    for file in "$folder"/*.conf; do ln -s "$file" /etc/slurm/; done
    slurmctld -c
    slurmd -c
    for _ in $(seq 50); do
        sinfo --noheader --format %t 2> "$folder/logs/sinfo.txt" | grep -q idle && exit 0
        sleep 0.2
    done
    echo "error: the node does not come up; see $folder/logs" >&2
    exit 1
}

stop() {
    for daemon in slurmd slurmctld; do
        pid=$(cat "$folder/$daemon.pid" 2> /dev/null) || continue
        kill "$pid" 2> /dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2> /dev/null || break; sleep 0.2; done
    done
    for file in /etc/slurm/*.conf; do
        case $(readlink "$file") in "$folder"/*) rm "$file" ;; esac
    done
}

"$action"
