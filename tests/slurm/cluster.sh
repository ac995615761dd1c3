#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests: controller, node and munge on the loopback, all state in one folder.
#   sudo tests/slurm/cluster.sh start FOLDER
#   sudo tests/slurm/cluster.sh stop FOLDER
# Needs root, Debian's packages slurm-wlm and munge, and a machine that has no Slurm of its own: /etc/slurm is linked to the folder,
# because jobs look there. Without accounting: `squeue` alone knows the jobs. GPUS=2 has it hand out made-up GPUs.
set -euo pipefail

action=${1:?start or stop} folder=$(realpath -m "${2:?a folder for its state}")
cores=$(nproc) memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024))
node=$(hostname -s)
gpus=${GPUS:-0}

start() {
    [ ! -e /etc/slurm/slurm.conf ] || { echo "error: /etc/slurm/slurm.conf exists: this machine has a Slurm" >&2; exit 1; }
    mkdir -p "$folder"/{controller,node,logs}
    if [ ! -S /run/munge/munge.socket.2 ]; then
        [ -s /etc/munge/munge.key ] || { head -c 1024 /dev/urandom > /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
        chown munge: /etc/munge/munge.key
        install -d -o munge -g munge /run/munge
        runuser -u munge -- munged
    fi
    {
        echo "ClusterName=test"
        echo "SlurmctldHost=$node(127.0.0.1)"
        echo "SlurmUser=root"
        echo "SlurmctldPort=${PORT:-6817}"
        echo "SlurmdPort=$((${PORT:-6817} + 1))"
        echo "StateSaveLocation=$folder/controller"
        echo "SlurmdSpoolDir=$folder/node"
        echo "SlurmctldPidFile=$folder/slurmctld.pid"
        echo "SlurmdPidFile=$folder/slurmd.pid"
        echo "SlurmctldLogFile=$folder/logs/slurmctld.log"
        echo "SlurmdLogFile=$folder/logs/slurmd.log"
        echo "ProctrackType=proctrack/linuxproc"
        echo "TaskPlugin=task/none"
        echo "SelectType=select/cons_tres"
        echo "SelectTypeParameters=CR_Core_Memory"
        echo "JobAcctGatherType=jobacct_gather/linux" # what sees that a job takes more memory than it asked for
        echo "JobAcctGatherFrequency=1"
        echo "JobAcctGatherParams=OverMemoryKill"
        echo "ReturnToService=2"
        echo "KillWait=2"
        [ "$gpus" = 0 ] || echo "GresTypes=gpu"
        echo "NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory$([ "$gpus" = 0 ] || echo " Gres=gpu:$gpus") State=UNKNOWN"
        echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    } > "$folder/slurm.conf"
    if [ "$gpus" != 0 ]; then
        for ((i = 0; i < gpus; i++)); do
            [ -e "$folder/nvidia$i" ] || mknod "$folder/nvidia$i" c 1 3 # Slurm wants a device; this one is /dev/null
            echo "NodeName=$node Name=gpu File=$folder/nvidia$i"
        done > "$folder/gres.conf"
    fi
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
