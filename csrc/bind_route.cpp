// Routing as Python sees it: a router's settings become a RouterSpec, and ids are checked that would be read past an
// end.
#include "bind_route.h"

namespace moesaic {
namespace {

using Optional = std::optional<Array>;

// The position of `name` in `names`, as the enum that lists them in this order.
template <class E, size_t N>
E named(const char *what, const std::string &name, const std::array<const char *, N> &names) {
    for (size_t i = 0; i < N; ++i)
        if (name == names[i]) return static_cast<E>(i);
    refuse(what, "'" + name + "' is not known here");
}

Router router_named(const std::string &name) {
    if (name == "switch" || name == "dense") return Router::softmax_topk;
    return named<Router, 14>("router", name, {"softmax_topk", "topk_softmax", "sigmoid_topk", "sqrt_softplus_topk",
                                              "sigmoid_input", "noisy_topk", "gshard_top2", "base", "sinkhorn", "hash",
                                              "sparsemixer", "relu", "top_p", "null_topk"});
}

template <class T>
const T *optional_data(const char *name, const Optional &array, Kind kind, std::initializer_list<int64_t> shape) {
    if (!array) return nullptr;
    check(name, *array, {kind}, shape);
    return data<T>(*array);
}

void check_spec(const RouterSpec &spec) {
    if (spec.num_experts < 1 || spec.num_null_experts < 0) refuse("num_experts", "must be 1 or more");
    if (spec.top_k < 1 || spec.top_k > spec.num_experts) refuse("top_k", "must be 1 to num_experts");
    if (spec.router == Router::gshard_top2 && spec.top_k != 2) refuse("top_k", "of gshard_top2 is 2");
    if ((spec.running_mean == nullptr) != (spec.running_var == nullptr))
        refuse("running_mean", "and running_var belong together");
    if ((spec.router == Router::hash) != (spec.table != nullptr)) refuse("table", "belongs to hash routers alone");
    if (spec.num_groups == 0) return;
    const bool fits = spec.num_groups > 0 && spec.num_experts % spec.num_groups == 0 && spec.num_null_experts == 0 &&
                      spec.top_groups >= 1 && spec.top_groups <= spec.num_groups &&
                      spec.top_k <= spec.top_groups * (spec.num_experts / spec.num_groups);
    if (!fits) refuse("groups", "do not divide the experts, or are too few for top_k");
}

void init_router(BoundRouter *self, const std::string &name, const std::array<int64_t, 3> &sizes, bool renormalize,
                 float scaling_factor, const std::array<int64_t, 2> &groups, const std::string &group_score,
                 const std::string &hash_weight, float p, float gap, const Optional &bias,
                 const Optional &running_mean, const Optional &running_var, const Optional &selection_bias,
                 const Optional &table) {
    BoundRouter *bound = new (self) BoundRouter{{}, 0, bias, running_mean, running_var, selection_bias, table};
    RouterSpec &spec = bound->spec;
    spec.router = router_named(name);
    spec.num_experts = sizes[0];
    spec.num_null_experts = sizes[1];
    spec.top_k = sizes[2];
    spec.renormalize = renormalize;
    spec.scaling_factor = scaling_factor;
    spec.num_groups = groups[0];
    spec.top_groups = groups[1];
    spec.group_score = named<GroupScore, 2>("group_score", group_score, {"max", "top2_sum"});
    spec.hash_weight =
        named<HashWeight, 4>("hash_weight", hash_weight, {"uniform", "softmax", "sigmoid", "sqrt_softplus"});
    spec.p = p;
    spec.gap = gap;
    spec.bias = optional_data<float>("bias", bias, Kind::f32, {spec.choices()});
    spec.running_mean = optional_data<float>("running_mean", running_mean, Kind::f32, {spec.choices()});
    spec.running_var = optional_data<float>("running_var", running_var, Kind::f32, {spec.choices()});
    spec.selection_bias = optional_data<float>("selection_bias", selection_bias, Kind::f32, {spec.num_experts});
    spec.table = optional_data<int32_t>("table", table, Kind::i32, {any, spec.top_k});
    bound->vocab_size = table ? size(*table, 0) : 0;
    check_spec(spec);
}

const float *check_logits(const Optional &logits, const RouterSpec &spec, int64_t tokens) {
    const bool needs_none = spec.router == Router::hash && spec.hash_weight == HashWeight::uniform;
    if (!logits && !needs_none) refuse("logits_TC", "are missing");
    return optional_data<float>("logits_TC", logits, Kind::f32, {tokens, spec.choices()});
}

const int64_t *check_token_ids(const Optional &token_ids, const BoundRouter &router, int64_t tokens) {
    const RouterSpec &spec = router.spec;
    if (spec.router != Router::hash) return nullptr;
    if (!token_ids) refuse("token_ids_T", "are missing; hash routing needs them");
    const int64_t *ids = optional_data<int64_t>("token_ids_T", token_ids, Kind::i64, {tokens});
    check_indices("token_ids_T", *token_ids, router.vocab_size);
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t k = 0; k < spec.top_k; ++k) {
            const int32_t expert = spec.table[ids[token] * spec.top_k + k];
            if (expert < 0 || expert >= spec.num_experts) refuse("table", "names experts that there are not");
        }
    return ids;
}

void check_choices(const Array &ids, int64_t num_experts) {
    check("ids_TM", ids, {Kind::i64}, {any, any});
    for (size_t i = 0; i < ids.size(); ++i)
        if (data<int64_t>(ids)[i] < -1 || data<int64_t>(ids)[i] >= num_experts)
            refuse("ids_TM", "holds an id outside -1 to " + std::to_string(num_experts - 1));
}

void bound_route(const BoundRouter &router, const Optional &logits, const Optional &token_ids, const Array &ids,
                 const Array &weights, int threads) {
    check("ids_TM", ids, {Kind::i64}, {any, router.spec.columns()});
    const int64_t tokens = size(ids, 0);
    check("weights_TM", weights, {Kind::f32}, {tokens, router.spec.columns()});
    const float *x = check_logits(logits, router.spec, tokens);
    const int64_t *tokens_read = check_token_ids(token_ids, router, tokens);
    nb::gil_scoped_release release;
    route(x, router.spec, tokens_read, data<int64_t>(ids), data<float>(weights), tokens, threads);
}

void bound_weigh_choices(const BoundRouter &router, const Optional &logits, const Array &ids, const Array &weights,
                         int threads) {
    check_choices(ids, router.spec.num_experts);
    const int64_t tokens = size(ids, 0), columns = size(ids, 1);
    if (router.spec.router != Router::relu && columns < router.spec.top_k) refuse("ids_TM", "has fewer than K columns");
    check("weights_TM", weights, {Kind::f32}, {tokens, columns});
    const float *x = check_logits(logits, router.spec, tokens);
    nb::gil_scoped_release release;
    weigh_choices(x, router.spec, data<int64_t>(ids), columns, data<float>(weights), tokens, threads);
}

int64_t bound_sort_by_expert(const Array &ids, const Array &weights, const Array &offsets, const Array &token_ids,
                             const Array &row_weights, const Array &row_of) {
    check("offsets", offsets, {Kind::i64}, {any});
    const int64_t num_experts = size(offsets, 0) - 1;
    if (num_experts < 0) refuse("offsets", "must hold one more than there are experts");
    check_choices(ids, num_experts);
    const int64_t tokens = size(ids, 0), columns = size(ids, 1);
    check("weights_TM", weights, {Kind::f32}, {tokens, columns});
    check("token_ids_R", token_ids, {Kind::i64}, {tokens * columns});
    check("weights_R", row_weights, {Kind::f32}, {tokens * columns});
    check("row_of_TM", row_of, {Kind::i64}, {tokens, columns});
    nb::gil_scoped_release release;
    return sort_by_expert(data<int64_t>(ids), data<float>(weights), tokens, columns, num_experts,
                          data<int64_t>(offsets), data<int64_t>(token_ids), data<float>(row_weights),
                          data<int64_t>(row_of));
}

}  // namespace

void bind_route(nb::module_ &m) {
    nb::class_<BoundRouter>(m, "Router")
        .def("__init__", &init_router, nb::arg("name"), nb::arg("sizes"), nb::kw_only(), nb::arg("renormalize"),
             nb::arg("scaling_factor"), nb::arg("groups"), nb::arg("group_score"), nb::arg("hash_weight"), nb::arg("p"),
             nb::arg("gap"), nb::arg("bias").none(), nb::arg("running_mean").none(), nb::arg("running_var").none(),
             nb::arg("selection_bias").none(), nb::arg("table").none())
        .def_prop_ro("columns", [](const BoundRouter &router) { return router.spec.columns(); })
        .def("route", &bound_route, nb::arg("logits_TC").none(), nb::arg("token_ids_T").none(), nb::arg("ids_TM"),
             nb::arg("weights_TM"), nb::arg("threads"))
        .def("weigh_choices", &bound_weigh_choices, nb::arg("logits_TC").none(), nb::arg("ids_TM"),
             nb::arg("weights_TM"), nb::arg("threads"));
    m.def("sort_by_expert", &bound_sort_by_expert, nb::arg("ids_TM"), nb::arg("weights_TM"), nb::arg("offsets"),
          nb::arg("token_ids_R"), nb::arg("weights_R"), nb::arg("row_of_TM"));
}

}  // namespace moesaic
