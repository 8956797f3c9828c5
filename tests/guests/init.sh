#!/bin/sh
# First process of a test guest: mounts what the TPM tools need, loads the modules of the image, then serves the agent
# protocol of tests/support/guest/agent.py on the second serial port, or on the one that the kernel's command line names
# as agent_port. It runs until the guest is reset or powered off.
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root TPM2TOOLS_TCTI=device:/dev/tpmrm0
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t securityfs security /sys/kernel/security

while read -r module; do
    insmod "$module" || echo "init: cannot load $module"
done < /etc/modules-in-order
if [ -x /etc/setup ]; then /etc/setup; fi

# Raw in both directions: no line-length limit, no echo, no newline translation.
port=${agent_port:-/dev/ttyS1}
stty -F $port 115200 raw -echo
exec 3<> $port

# The leading newline ends whatever a firmware left on the line.
printf '\n@agent ready %s\n' "$(cat /proc/sys/kernel/random/boot_id)" >&3
while read -r marker number script <&3; do
    if [ "$marker" != "@run" ]; then continue; fi
    echo "$script" | base64 -d > /tmp/agent.script
    sh -o pipefail /tmp/agent.script < /dev/null > /tmp/agent.out 2> /tmp/agent.err
    status=$?
    {
        printf '\n@agent done %s %s ' "$number" "$status"
        base64 -w 0 /tmp/agent.out
        printf ' '
        base64 -w 0 /tmp/agent.err
        printf ' .\n'
    } >&3
done
echo "init: the agent's port ended"
poweroff -f
