(function () {
  "use strict";
  var PAGE = 12, SHORT = 600;
  var block = document.getElementById("answer-data");
  var place = document.getElementById("answers");
  var status = document.getElementById("answer-status");
  var controls = document.getElementById("answer-controls");

  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not(.folded)").forEach(function (details) { details.open = true; });
  });
  keepUpToDate(Number(document.documentElement.getAttribute("data-refresh")));
  if (!block || !place) return;
  if (typeof DecompressionStream === "undefined") {
    status.textContent = "This browser cannot unpack the answers of this page; they are in the JSON file beside it.";
    return;
  }

  // A page of a run in progress loads itself again, but not while somebody types, selects text or has just scrolled.
  // What is searched and filtered is in the address; the place on the page and the open parts are kept here.
  function keepUpToDate(seconds) {
    if (!seconds) return;
    var key = "bfpo-place", touched = 0, kept = null;
    ["input", "keydown", "pointerdown", "wheel", "touchmove"].forEach(function (name) {
      window.addEventListener(name, function () { touched = Date.now(); }, { passive: true });
    });
    function parts() { return Array.prototype.slice.call(document.querySelectorAll("section details:not(.folded)")); }
    try { kept = JSON.parse(sessionStorage.getItem(key)); sessionStorage.removeItem(key); } catch (error) { kept = null; }
    if (kept) {
      parts().forEach(function (part, number) { if (number in kept.open) part.open = kept.open[number]; });
      if (block && place) place.addEventListener("drawn", back, { once: true });
      back();
    }
    function back() { window.scrollTo(0, kept.at); }
    setInterval(function () {
      var selected = window.getSelection && String(window.getSelection());
      if (document.hidden || selected || Date.now() - touched < 4000) return;
      try {
        sessionStorage.setItem(key, JSON.stringify({ at: window.scrollY, open: parts().map(function (part) { return part.open; }) }));
      } catch (error) { /* a browser without storage starts at the top */ }
      location.reload();
    }, seconds * 1000);
  }

  // Text is always set as text, so that the output of models is never parsed as HTML.
  function make(tag, name, text) {
    var element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function button(text, name, act) {
    var element = make("button", name, text);
    element.type = "button";
    element.addEventListener("click", act);
    return element;
  }

  function bytes(text) {
    var raw = atob(text.trim());
    var array = new Uint8Array(raw.length);
    for (var i = 0; i < raw.length; i++) array[i] = raw.charCodeAt(i);
    return array;
  }

  var stream = new Blob([bytes(block.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  new Response(stream).json().then(start, function () {
    status.textContent = "The answers of this page could not be unpacked; they are in the JSON file beside it.";
  });

  function start(data) {
    var shown = data.rows, at = 0, open = {};
    // The same word is found whatever its case; lower case keeps the length of nearly every text.
    var haystacks = data.rows.map(function (row) {
      return (row[0] + "\n" + row[3].map(function (answer) { return answer[1] + "\n" + (answer[5] || ""); }).join("\n")).toLowerCase();
    });
    var differs = data.rows.map(function (row) {
      var first = null;
      return row[3].some(function (answer) {
        var words = decisive(answer).join(", ");
        if (first === null) first = words;
        return words !== first;
      });
    });
    var fields = {};

    // The words of a verdict, without those that differ from answer to answer.
    function decisive(answer) {
      return data.badges[answer[2]].map(function (badge) { return badge[0]; }).filter(function (word) {
        return word.indexOf("helpfulness") !== 0 && word.indexOf("cut at") !== 0 && word !== "judges differ";
      });
    }

    function values(column) {
      var seen = [];
      data.rows.forEach(function (row) { if (row[column] && seen.indexOf(row[column]) < 0) seen.push(row[column]); });
      return seen;
    }

    function choice(name, label, options, none) {
      if (options.length < 2 && name !== "verdict") return;
      var box = make("label", "", label);
      var select = make("select");
      select.id = "filter-" + name;
      [["", none || "all"]].concat(options).forEach(function (option) {
        var item = make("option", "", option[1]);
        item.value = option[0];
        select.appendChild(item);
      });
      select.addEventListener("change", filter);
      box.appendChild(select);
      controls.appendChild(box);
      fields[name] = select;
    }

    function pairs(list) { return list.map(function (item) { return [item, item]; }); }
    choice("suite", "Suite", pairs(values(2)));
    choice("kind", "Kind of prompt", pairs(values(1)));
    choice("category", "Category", pairs(values(7)));
    var words = [];
    data.badges.forEach(function (set) {
      set.forEach(function (badge) {
        if (words.indexOf(badge[0]) < 0 && badge[0].indexOf("helpfulness") !== 0) words.push(badge[0]);
      });
    });
    choice("verdict", "Verdict", pairs(words));
    choice("method", "of the model", data.methods.map(function (method, number) { return [String(number), method[0]]; }));
    if (differs.indexOf(true) >= 0) choice("models", "Verdicts of the models", [["differ", "differ"], ["agree", "agree"]]);
    var differ = differs.indexOf(true) >= 0 ? [["differ", "models differ first"]] : [];
    choice("sort", "Sort", differ.concat([["unsafe", "most unsafe answers first"],
      ["long", "longest answer first"], ["short", "shortest answer first"], ["name", "prompt, A to Z"]]), words.indexOf("judges differ") >= 0 ? "judges differ first" : "as in the data");
    var box = make("label", "search", "Search");
    var search = make("input");
    search.type = "search";
    search.id = "filter-search";
    search.autocomplete = "off";
    var waiting = 0;
    search.addEventListener("input", function () { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
    box.appendChild(search);
    controls.appendChild(box);

    function chosen(name) { return fields[name] ? fields[name].value : ""; }
    function sought() { return search.value.trim().toLowerCase(); }

    function filter() {
      var suite = chosen("suite"), kind = chosen("kind"), category = chosen("category"), verdict = chosen("verdict"), method = chosen("method");
      var models = chosen("models"), text = sought();
      var found = [];
      data.rows.forEach(function (row, number) {
        if (suite && row[2] !== suite) return;
        if (kind && row[1] !== kind) return;
        if (category && row[7] !== category) return;
        if (models && differs[number] !== (models === "differ")) return;
        if (text && haystacks[number].indexOf(text) < 0) return;
        var wanted = !verdict && !method || row[3].some(function (answer) {
          if (method && String(answer[0]) !== method) return false;
          return !verdict || data.badges[answer[2]].some(function (badge) { return badge[0] === verdict; });
        });
        if (wanted) found.push(number);
      });
      shown = sorted(found, chosen("sort")).map(function (number) { return data.rows[number]; });
      at = 0;
      draw();
      remember();
    }

    function sorted(numbers, by) {
      if (!by) return numbers;
      function longest(row) { return Math.max.apply(null, row[3].map(function (answer) { return answer[1].length + answer[4]; })); }
      var key = {
        differ: function (number) { return differs[number] ? 0 : 1; },
        unsafe: function (number) {
          return -data.rows[number][3].filter(function (answer) { return decisive(answer).indexOf("unsafe") >= 0; }).length;
        },
        long: function (number) { return -longest(data.rows[number]); },
        short: function (number) { return longest(data.rows[number]); },
        name: function (number) { return data.rows[number][0].toLowerCase(); }
      }[by];
      var keys = {};
      numbers.forEach(function (number) { keys[number] = key(number); });
      return numbers.sort(function (a, b) { return keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : a - b; });
    }

    // The address holds what is filtered, so that a link or a reload shows the same prompts.
    function remember() {
      var state = new URLSearchParams();
      Object.keys(fields).forEach(function (name) {
        var value = name === "method" && chosen(name) ? data.methods[Number(chosen(name))][0] : chosen(name);
        if (value) state.set(name, value);
      });
      if (search.value.trim()) state.set("search", search.value.trim());
      if (at) state.set("page", String(at / PAGE + 1));
      var text = state.toString();
      history.replaceState(null, "", text ? "#samples?" + text : location.pathname + location.search);
    }

    function recall() {
      var hash = location.hash, linked = /^#prompt-([0-9a-f]+)$/.exec(hash);
      var state = new URLSearchParams(hash.indexOf("#samples?") === 0 ? hash.slice(9) : "");
      Object.keys(fields).forEach(function (name) {
        var value = state.get(name) || "";
        if (name === "method" && value) {
          value = String(data.methods.findIndex(function (method) { return method[0] === value; }));
        }
        fields[name].value = value;
        if (fields[name].selectedIndex < 0) fields[name].value = "";
      });
      search.value = state.get("search") || "";
      var page = Number(state.get("page")) || 1, kept = hash;
      filter();
      var number = linked ? shown.findIndex(function (row) { return row[4] === linked[1]; }) : -1;
      at = number >= 0 ? number - number % PAGE : Math.max(0, Math.min((page - 1) * PAGE, shown.length - 1));
      at -= at % PAGE;
      draw();
      history.replaceState(null, "", kept || location.pathname + location.search);
      if (linked && number < 0) status.textContent = "The linked prompt is not on this page. " + status.textContent;
      var target = number >= 0 ? document.getElementById("prompt-" + linked[1]) : null;
      if (!target && kept.indexOf("#samples?") === 0) target = document.getElementById("samples");
      if (target) target.scrollIntoView();
      if (target && number >= 0) target.classList.add("linked");
      place.dispatchEvent(new Event("drawn"));
    }

    // A text, or its start, with the first places marked where the search finds something.
    function fill(element, text, whole) {
      var word = sought(), lower = word ? text.toLowerCase() : "";
      var end = whole ? text.length : Math.min(text.length, SHORT), from = 0;
      element.textContent = "";
      for (var hit = word ? lower.indexOf(word) : -1, marks = 0; hit >= 0 && hit < end && marks < 200; marks++) {
        element.appendChild(document.createTextNode(text.slice(from, hit)));
        element.appendChild(make("mark", "", text.slice(hit, hit + word.length)));
        from = hit + word.length;
        hit = lower.indexOf(word, from);
      }
      element.appendChild(document.createTextNode(text.slice(from, Math.max(end, from)) + (end < text.length ? "\u2026" : "")));
    }

    // Long texts show their start; all of it on a click, and at once where the search finds something beyond the start.
    function long(text, missing, key, name) {
      var holder = document.createDocumentFragment();
      var element = make("p", name);
      element.dir = "auto";
      holder.appendChild(element);
      var word = sought();
      var whole = open[key] || text.length <= SHORT || (word !== "" && text.toLowerCase().indexOf(word) + word.length > SHORT);
      fill(element, text, whole);
      if (text.length > SHORT) {
        var more = button("", "more", function () { whole = open[key] = !whole; show(); });
        var show = function () {
          fill(element, text, whole);
          more.textContent = whole ? "Show less" : "Show all " + text.length.toLocaleString("en") + " characters";
          more.setAttribute("aria-expanded", String(whole));
        };
        show();
        holder.appendChild(more);
      }
      if (missing) holder.appendChild(make("p", "cut", "cut on this page: " + missing + " more characters"));
      return holder;
    }

    function body(answer, key) {
      if (!answer[1] && !answer[5]) return make("p", "text none", "(nothing written)");
      var holder = document.createDocumentFragment();
      holder.appendChild(answer[1] ? long(answer[1], answer[4], key, "text") : make("p", "text none", "(no answer behind the thoughts)"));
      // Thoughts may be harmful where the answer is not.
      if (answer[5]) {
        holder.appendChild(folded("Show the thoughts before this answer, which were not judged", function () {
          return long(answer[5], answer[6], key + " thoughts", "text");
        }));
      }
      return holder;
    }

    // The text is added on a click, so that neither a search in the browser nor a print shows it before.
    function folded(title, content) {
      var details = make("details", "folded");
      details.appendChild(make("summary", "", title));
      details.addEventListener("toggle", function () {
        if (details.open && details.childNodes.length === 1) details.appendChild(content());
      });
      return details;
    }

    function facts(found) {
      var list = make("dl", "behind");
      found.forEach(function (fact) {
        list.appendChild(make("dt", "", fact[0]));
        list.appendChild(make("dd", "", fact[1]));
      });
      return list;
    }

    function card(answer, row) {
      var method = data.methods[answer[0]], key = row[4] + " " + answer[0];
      var element = make("div", "answer");
      element.style.setProperty("--own", "var(--" + method[1] + ")");
      element.appendChild(make("h4", "who", method[0]));
      element.appendChild(answer[3] ? folded("Show an answer that may be harmful", function () { return body(answer, key); }) : body(answer, key));
      var list = make("div", "badges");
      data.badges[answer[2]].forEach(function (badge) {
        list.appendChild(make("span", "badge " + badge[1], badge[0]));
      });
      element.appendChild(list);
      if (answer[7]) {
        var details = folded("Behind the verdict", function () { return facts(answer[7]); });
        details.classList.add("facts");
        element.appendChild(details);
      }
      return element;
    }

    function draw() {
      place.textContent = "";
      shown.slice(at, at + PAGE).forEach(function (row, number) {
        var article = make("article", "sample");
        article.id = "prompt-" + row[4];
        var called = "Prompt " + row[5] + (row[6] ? ", sample " + row[6] : "");
        var title = make("h3", "", called);
        var link = make("a", "link", "link");
        link.href = "#prompt-" + row[4];
        link.setAttribute("aria-label", "Link to " + called.toLowerCase());
        title.appendChild(link);
        [row[1], row[2], row[7]].forEach(function (word) { if (word) title.appendChild(make("span", "badge plain", word)); });
        article.appendChild(title);
        article.appendChild(long(row[0], 0, row[4], "prompt"));
        var answers = make("div", "answers");
        row[3].forEach(function (answer) { answers.appendChild(card(answer, row)); });
        article.appendChild(answers);
        place.appendChild(article);
      });
      var last = Math.min(at + PAGE, shown.length);
      var several = data.rows.some(function (row) { return row[6]; }), things = several ? "Samples" : "Prompts";
      status.textContent = shown.length
        ? things + " " + (at + 1) + " to " + last + " of " + shown.length + (shown.length < data.rows.length ? " found, " + data.rows.length + " in all" : "")
          + (several ? "; " + data.rows.reduce(function (most, row) { return Math.max(most, row[5]); }, 0) + " prompts in all" : "")
        : "No " + things.toLowerCase().slice(0, -1) + " matches; " + data.rows.length + " in all";
      back.disabled = at === 0;
      next.disabled = last >= shown.length;
    }

    var pager = document.getElementById("answer-pager");
    function step(text, by) {
      var element = button(text, "", function () {
        at += by;
        draw();
        remember();
        document.getElementById("samples").scrollIntoView();
        status.focus();
      });
      pager.appendChild(element);
      return element;
    }
    var back = step("Previous", -PAGE), next = step("Next", PAGE);
    window.addEventListener("hashchange", function () {
      if (/^#(prompt-|samples\?)/.test(location.hash)) recall();
    });
    recall();
    place.setAttribute("data-ready", "true");
  }
})();
