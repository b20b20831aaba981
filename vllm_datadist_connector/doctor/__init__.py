"""`vllm-datadist doctor`: what of this machine, this environment and this configuration will work, and what to do.

    command ── checks: installation, network, transports, peer, ascend/ ──> findings ──> text or JSON
                 │ see the host through Machine, the deployment through Deployment
                 └── try for real what can be tried: links by each transport, the peer's side channel, the loader of
                     CANN's library; what may end a process has one of its own

Nothing of vLLM or torch is imported in this process: a broken one is to be found, not to end the doctor.
"""
