"""`python -m edm_deploy_tools.bench_gpu`: the first day on a GPU."""
