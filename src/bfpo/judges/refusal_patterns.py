"""The patterns of refusal reading, for sentences in lower case with plain apostrophes and without the words of others.

They are searched in ASCII (`in_ascii`), in which word characters are found faster.

All repetitions are bounded, so the time of a search is linear in the length of the sentence.
"""

from __future__ import annotations

import re

__all__ = [
    "ADMONISHES",
    "ASKS_HOW",
    "BARE",
    "CLEAR",
    "COULD_NOT",
    "CRISIS",
    "DEFLECTS",
    "DENIES",
    "FRAMED",
    "HABIT",
    "HELPS",
    "IDIOM",
    "LETTER",
    "LOADED",
    "MORAL",
    "NO",
    "OFFERS",
    "OTHERS_WORDS",
    "POLICY",
    "PROMISES",
    "QUESTION_WORDS",
    "REJECTS",
    "SAID",
    "SOFT",
    "SORRY",
    "SORRY_BAD",
    "SORRY_FOR_YOU",
    "SPEAKER",
    "STANCE",
    "TERSE",
    "TOPICS",
    "TURNS_BACK",
    "UNFIT",
    "UNWILLING",
    "YES",
    "YES_OR_NO",
]


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


def _any(*patterns: str) -> re.Pattern[str]:
    return _compiled("|".join(f"(?:{pattern})" for pattern in patterns))


def _words(*patterns: str, elsewhere: str = "") -> re.Pattern[str]:
    """Return the union of patterns that begin with a word or its apostrophe; it is tried only there, which is fast.

    `elsewhere`: a pattern that may begin inside a word.
    """
    union = rf"\b(?=[\w'])(?:{'|'.join(patterns)})"
    return _compiled(f"{union}|{elsewhere}" if elsewhere else union)


# ---------------------------------------------------------------------------------------------- who, and what is denied

_I = (
    r"\b(?:i|we|this assistant|the assistant|this (?:ai|model|chatbot|bot|service))\b(?:,? (?:and )?(?:also|just|"
    r"really|simply|still|even|currently|therefore|thus|unfortunately|regrettably|sadly|respectfully|personally|"
    r"honestly|do|certainly|definitely|absolutely|kindly|politely|firmly|strictly|always|ever|only|"
    r"under no circumstances|as an? (?:\w+ )?(?:ai|assistant)),?){0,3} ?"
)
_BE = r"(?:'?m|'?re|am|are|is|was|were|have been|'?ve been|feel)"
_NOT_DO = (  # a modal verb, an ability or a will, denied
    r"(?:can'?t|cannot|can not|can neither|can no longer|could never|would never|will never|can never|won'?t|"
    r"will not|shan'?t|shall not|may not|must not|mustn'?t|shouldn'?t|should not|never|(?:would|will|'ll|wouldn'?t|"
    r"won'?t)(?: not)? be able to|(?:'d|would) (?:rather|prefer)(?: to)? not(?: to)?|prefer not to|"
    rf"{_BE} (?:\w+ ){{0,2}}?(?:not|n't) (?:\w+ly )?(?:able|allowed|permitted|authori[sz]ed|going|willing|prepared|"
    rf"programmed|"
    r"designed|trained|equipped|meant|supposed|capable|in a position|at liberty|about|qualified|inclined|comfortable|"
    r"built|made|licensed|interested)(?: of| to| in| with)?|"
    rf"{_BE} (?:\w+ly )?(?:unable|unwilling|forbidden|uncomfortable|prohibited|restricted|barred|banned|prevented|"
    rf"incapable|hesitant|reluctant)"
    r"(?: to| from| of| with)?|"
    rf"{_BE} (?:\w+ly )?(?:programmed|designed|trained|instructed|told|asked|built|made|bound|required|configured) "
    r"(?:not to|never to|to (?:avoid|refuse|decline|refrain from))|(?:do not|don'?t|does not) (?:want|wish|intend|"
    r"feel able|plan|care|mean|get) to|(?:choose|chose|choosing|decided|opt|opted|prefer|swore|vowed|promised|agreed|"
    r"elect|(?:have|'ve) (?:decided|chosen|sworn|opted)|(?:am|'m) choosing) not to|(?:do not|don'?t|"
    r"does not) have (?:(?:the|any) )?(?:ability|capacity|capability|authority|right|permission|means|"
    r"intention) (?:to|of)|lack the (?:ability|capacity|capability|authority|means) to|have no (?:way|means|"
    r"intention|ability|plans|desire) (?:of|to)|(?:do not|don'?t) (?:think|believe|feel) (?:that )?i (?:can|should|"
    r"could|ought to|will|am able to|'?m able to)|(?:must |have to |need to |will |should |(?:am|"
    r"'m) going to )?(?:refrain from|avoid)|try to avoid|(?:tend|prefer) to avoid)"
)
_FILLER = (
    r"(?: (?!see\b|believe|that\b|how\b|what\b|why\b|if\b|imagine|think\b|use\b|know\b|find\b|say\b|tell (?:if|"
    r"whether|which|from))[\w',-]+){0,5}?"
)
_SERVE = (  # verbs that serve a request: denied, they decline it
    r"(?:help(?!(?: but\b|ful| it\b|er| \w+ing\b))|helping|assist(?!ant)|assisting|provid(?:e|ing)|support(?:ing)?|"
    r"fulfil+(?:ing)?|compl(?:y|ying)|condon(?:e|ing)|endors(?:e|ing)|engag(?:e|ing)|facilitat(?:e|ing)|"
    r"participat(?:e|ing)|promot(?:e|ing)|encourag(?:e|ing)|generat(?:e|ing)|discuss(?:ing)?|advis(?:e|ing)|"
    r"advocat(?:e|ing)|disclos(?:e|ing)|reveal(?:ing)?|accommodat(?:e|ing)|oblige|entertain(?:ing)?|"
    r"role-?play(?:ing)?|speculat(?:e|ing)|suggest(?:ing)?|respond(?:ing)?|instruct(?:ing)?|glorify(?:ing)?|"
    r"assign(?:ing)?|carry(?:ing)? out|be (?:a )?part (?:of|in|to)|tak(?:e|ing) (?:part|sides|a (?:side|position|"
    r"stance))|pick(?:ing)? (?:a side|sides)|be of (?:help|assistance|service)|(?:be )?involved? in|weigh(?:ing)? in|"
    r"play along|go along|go (?:there|into (?!(?:all|every|detail|more detail|too much|depth))|any further|further|"
    r"that far|on with|through with|ahead with)|get(?:ting)? into|talk(?:ing)? about|speak(?:ing)? (?:about|to|on)|"
    r"have (?:that|this) conversation|walk(?:ing)? (?:you|anyone)|guid(?:e|ing) (?:you|anyone)|t(?:ell|elling|each|"
    r"eaching) (?:you|anyone|anybody|people)|show(?:ing)? (?:you|anyone)|let you|giv(?:e|ing) (?:you|out|any|advice|"
    r"tips|legal|medical|instructions|information|guidance|details|that|this|such|it|anyone|investment|financial|"
    r"personal|specific|an answer|opinions)|offer(?:ing)?|comment(?:ing)? on|touch(?:ing)? (?:on|that|this)|"
    r"answer(?:ing)?(?! (?:yet|for))|repl(?:y|ying)|continu(?:e|ing)|proceed(?:ing)?|cooperat(?:e|ing)|contribut(?:e|"
    r"ing)|recommend(?:ing)?|process (?:this|your|that)|brows(?:e|ing)|diagnos(?:e|ing)|predict(?:ing)?|"
    r"accept (?:this|your) (?:request|task)|(?:see|open|view|read|watch|hear|listen to|access|visit|"
    r"load) (?:\w+ ){0,3}?(?:images?|pictures?|photos?|links?|files?|videos?|audio|attachments?|screen|urls?|"
    r"websites?|web ?pages?|pdfs?|documents?)|share|sharing|produc(?:e|ing)|creat(?:e|ing)|writ(?:e|ing)|do (?:that|"
    r"this|it|so|things? like)|doing (?:that|this|it|so))\b"
)
_OTHER = (  # verbs that serve a request if their object is it
    r"(?:do|doing|mak(?:e|ing)|draft(?:ing)?|describ(?:e|ing)|explain(?:ing)?|say|complet(?:e|ing)|perform(?:ing)?|"
    r"execut(?:e|ing)|show|list|compos(?:e|ing)|pretend(?:ing)?|simulat(?:e|ing)|translat(?:e|ing)|summari[sz](?:e|"
    r"ing)|access(?:ing)?|check|verify|confirm|reproduc(?:e|ing)|quot(?:e|ing)|send|allow|talk|deliver|supply|print|"
    r"output|display|act|invent|fabricat(?:e|ing)|jok(?:e|ing)|insult(?:ing)?|mock(?:ing)?|give|giving|take|tell|"
    r"accept|honou?r|grant|approve|be|plan|design|build|copy|publish|post|rat(?:e|ing)|rank|imitat(?:e|ing)|"
    r"impersonat(?:e|ing)|lie|commit|attack|hack|hurt|harm|handle|manage|satisfy|address|outline|name|"
    r"identify(?:ing)?|locat(?:e|ing)|track|look up|play|draw|spread|present|state|choose|argu(?:e|ing)|claim|"
    r"justify(?:ing)?|defend|consider|repeat (?:it all|myself)|follow|obey|go|cross|teach|train|encode|decode|bypass|"
    r"unlock)\b"
)
_REQUEST = (  # an object that is the request, or the end of the sentence
    r"(?:(?: \w+){0,3}? (?:this|that|these|those|such|your|you|any|it|content|materials?|jokes?|instructions?|"
    r"information|requests?|questions?|tasks?|so|images?|pictures?|photos?|links?|files?|advice|details|threats|"
    r"e-?mails?|messages?|reminders?|people|person|someone|somebody|anyone|who|how|one|anything|something|illegal|"
    r"harmful|sexual|explicit|violent|hateful|malicious|personal|private|legal|medical|financial|malware|"
    r"the (?:whole|full|rest|entire|content|file|requested|text|question|request|link|attachment|picture|image|"
    r"internet|web)|an? (?:\w+ ){0,2}?(?:that|which|about|for|to|story|joke|poem|letter|review|text|list|message|"
    r"response|plan|script|code|article|answer|essay))\b|$)"
)
_TELL = r"(?: \w+){0,2} tell (?:if|whether|which|what|why|how|from|for sure|the difference)\b"
IDIOM = _words(  # the words of a refusal, in another sense
    r"(?:can'?t|cannot|can not|couldn'?t|could not) (?:\w+ly )?(?:help (?:but|it|\w+ing\b)|wait|stress|"
    r"emphasi[sz]e|overstate|imagine|think of|believe|stand|complain|say (?:enough|for (?:sure|certain)|"
    r"(?:that )?(?:it|he|she|they)\b|(?:that )?i(?:'ve| have))|thank|agree more|recommend (?:\w+ ){0,6}(?:enough|"
    r"highly|more)|wrap my|re(?:member|call) (?:when|if|the|his|her|a|what|who|where|whether|ever|exactly)|"
    r"put it down|resist|guarantee|promise|see (?:any|why|the|how|what|a)\b|find (?:any|a |the)|get (?:enough|no|any|"
    r"over|the|my)|do without|go on|do (?:this|it|that) (?:any ?more|alone|without you|without)|make it (?:to|on|"
    r"this|that|tonight|tomorrow)|take (?:it|this) any|give up|keep up|afford|tell (?:if|whether|which|from|"
    r"the difference)|use \w+ (?:here|twice)|decide for you|speak for (?:every|all)|feel|taste|smell|sleep|live|"
    r"breathe|fly|argue with that)",
    r"(?:won'?t|will not) (?:\w+ly )?(?:lie|argue|ask|bore|go into|sugar-?coat|pretend (?:that|to know|it)|deny|"
    r"hide|repeat|beat around|let you down|give up|be (?:long|the (?:same|first|last))|forget|be able to (?:attend|"
    r"make it|come|join)|use (?:any|the|\w+ points)|mention|spoil|add|include|stop)",
    rf"(?:not|cannot|unable){_TELL}",
    r"(?:'m|am) not going to lie\b|don'?t (?:want|need|have|get|care) to (?:go back|lose|worry|miss|brag|spoil|"
    r"overstate|bore)",
    r"(?:if|when|suppose|what|whatever|everything|things|which|who|where) (?:i|we) (?:can'?t|cannot|won'?t|"
    r"don'?t) (?!in )",
    r"(?:can't|cannot|can not) \w+ (?:\w+ ){0,6}?(?:highly )?enough\b",
    r"(?:offer|invitation|position|job|role|meeting|promotion|gift)\b.{0,60}\b(?:decline|refuse|accept|attend)|"
    r"(?:decline|refuse|accept|attend) (?:\w+ ){0,3}(?:offer|invitation|position|job|role|meeting|promotion|gift)",
    r"(?:refuse|refuses) to (?:be|believe|accept|give up|let|go|stop|sleep|eat)\b|i (?:can|"
    r"could) (?:\w+ )?not only\b|we (?:can't|cannot|can not) (?:know|conclude|see|be sure)",
    elsewhere=f"n't{_TELL}",
)
_DECLINE = (
    r"(?:refuse|decline|opt out|abstain|turn (?:this|that|it) down|(?:reject|object to) (?:this|that|your)|(?:'ll |"
    r"will )?refrain(?:$| from)|am (?:\w+ly )?(?:obliged|obligated|bound|required|forced) to (?:refuse|decline)|"
    r"'m (?:\w+ly )?(?:obliged|obligated|bound|required|forced) to (?:refuse|decline)|(?:must|have to|need to|"
    r"will(?: have to)?|(?:am|'m) (?:going|afraid i) (?:to(?: have to)?|must|have to)|'ll(?: have to)?|'d have to|"
    r"would have to|ought to|choose to|chose to|'d like to|would like to|'d prefer to|would prefer to|'ve decided to|"
    r"wish to|want to|should|feel (?:obliged|compelled) to|am (?:obliged|required|forced) to) (?:\w+ly )?(?:refuse|"
    r"decline|say no|pass\b|turn (?:this|that|it|you|down)|stop here|stop (?:this|the) conversation|opt out|abstain|"
    r"withhold|draw (?:the|a) line|leave it (?:there|here)|reject|steer clear|sit this|skip (?:this|that)|stop you|"
    r"stay (?:out|silent|neutral)|disappoint you|end (?:this|the|our) (?:conversation|chat))|(?:am|"
    r"'m) (?:going to )?(?:pass(?:ing)?$|declining|refusing|ending this|opting out|out$|keeping (?:that|it|my) )|"
    r"plead the fifth)"
)
_LIMITS = (
    r"(?:(?:do not|don'?t|does not) have (?:(?:any|the|direct|real-?time|personal|enough|sufficient|up-to-date|"
    r"current|specific) ?){0,2}(?:access|ability|capacity|capability|information (?:on|about|regarding)|data (?:on|"
    r"about)|knowledge of|records? of|way (?:of|to))|have no (?:access|way|means|information|knowledge|record)|"
    r"lack (?:the )?(?:access|ability|capacity|information)|only (?:answer|help|assist|discuss|deal|talk|respond|"
    r"cover|support)|can only (?:help|answer|assist|discuss|talk|respond|support)|(?:'m|am) (?:only )?(?:here|able|"
    r"designed|built|trained|meant|made) (?:only )?to (?:help|answer|assist|discuss|talk)\b.{0,40}\bonly\b|(?:'m|"
    r"am) only (?:here|able|designed|built|trained|meant|made|allowed) to|(?:'m|am) not the right|(?:prefer to |"
    r"will |must |'ll )?(?:remain|stay|stay out of|keep out of) (?:neutral|impartial|politics|it|this|that))"
)
_BAD = (
    r"(?:illegal|unethical|irresponsible|wrong|inappropriate|immoral|improper|harmful|dangerous|unsafe|impossible|"
    r"dishonest|a crime|against the law|unacceptable)"
)
_GOOD = (
    r"(?:appropriate|ethical|acceptable|okay|ok|right|legal|accurate|fair|respectful|safe|productive|recommended|"
    r"advisable|justified|justifiable|morally|responsible|constructive|possible|permissible|allowed|a good idea|best|"
    r"moral|true|helpful|healthy|feasible)"
)
_MY_RULES = (
    r"(?:my|our|openai'?s?|anthropic'?s?|google'?s?|meta'?s?|the (?:content|usage|use|safety|platform|community|"
    r"ethical|rules i|rules for me|policy i|principles i|guidelines i)) ?(?:\w+'?s? ){0,3}(?:guidelines?|polic(?:y|"
    r"ies)|programming|rules?|principles|ethics|terms|values|instructions|purpose|design|follow|me|code|standards|"
    r"training|nature)"
)
_ANSWERING = (
    r"(?:generating|discussing|sharing|providing|writing|creating|producing|answering|helping|giving|describing|"
    r"explaining|doing|assisting|offering|fulfil+ing|complying|making)"
)

# ------------------------------------------------------------------------------------------------- kinds of sentences

CLEAR = _words(  # the speaker declines, whatever else the answer says
    r"not (?:with)?in my (?:\w+ )?(?:programming|guidelines|capabilit|abilit|scope|remit|power|nature)|(?:is|'s|"
    r"are) beyond me\b|not in the business of\b|i(?:'m| am) not (?:an? |your |here )(?:tool|accomplice|weapon|"
    r"for that|for this|to help)|this is where i (?:stop|draw)|you (?:can't|cannot|won't) make me\b|"
    r"my answer must be no\b|^(?:\w+,? )?i pass$",
    r"too (?:dangerous|sensitive|risky|harmful|private|personal) (?:a \w+ )?(?:for me )?to (?:explain|discuss|"
    r"share|describe|talk|answer|give|write|help)",
    rf"i\b.{{0,60}}\b(?:and|to|rather) not (?:to )?{_SERVE}",
    r"(?:but|just|though) not (?:with |for |to |in )?(?:this|that)(?: one)?$|(?:leave (?:that|it|this) (?:alone|"
    r"be|there)|leave it at that)$",
    r"i(?: \w+ly)? (?:don't|do not|wouldn't|would not) feel (?:\w+ )?(?:ok|okay) (?:with|about|help|giv|do)",
    rf"{_I}(?:{_NOT_DO}(?:(?:,| and| or|;) {_NOT_DO})?{_FILLER},? (?:to )?{_SERVE}|{_DECLINE}\b|"
    rf"(?:do not|don'?t) (?:\w+ly )?(?:help|assist|provid|engag|condon|participat|generat|comply|support (?!this|"
    rf"it\b)|promot|endors|facilitat|discuss|"
    r"disclose|role-?play|speculat|take sides|do (?:that|this|those|these|such)|want (?:any|a|no) part)|"
    rf"(?:'?m|am) not (?:\w+ly )?(?:helping|touching|doing|answering|writing|engaging|discussing|sharing|telling|"
    rf"giving|providing|"
    r"playing|entertaining|participating|getting into|going there|going to)\b)",
    rf"(?:and|but|so|therefore|thus|hence)\b,? (?:i )?(?:can'?t|cannot|can not|won'?t|will not|am unable to|"
    rf"must decline|am not able to){_FILLER} {_SERVE}",
    r"i(?:'m| am)?\b.{0,80}\b(?:and|but|so) (?:do not|don't) (?:condone|promote|encourage|endorse|support|engage|"
    r"provide|assist)",
    r"(?:not|\w*n't|never) (?:(?:something|somewhere|a (?:topic|subject|task|request|thing|question|conversation|line|"
    r"road|place|game)|one|an? \w+) (?:that |which |where )?(?:i|we)\b|"
    rf"(?:be )?(?:\w+ (?:or|and|,) )?{_GOOD}(?: (?:or|and) \w+)? (?:for me )?to (?:provide|"
    rf"offer|give|share|"
    r"discuss or promote|encourage or provide) (?:\w+ ){0,3}?(?:you|advice|instructions?|information|guidance|"
    r"answers?|tips|methods?|ways|explanations?|assistance|such)\b|"
    r"(?<!never )(?:okay|ok|right|fair|appropriate) to ask me\b)",
    r"i (?:do not|don't) (?:think|believe) (?:that|this|it)(?:'s| is) (?:something|a \w+) i\b|cross(?:es)? (?:a|"
    r"the|my) line\b|want no part\b|nothing to say (?:about|on|to)\b",
    r"(?:and|so|but),? i (?:can't|cannot|won't|will not|'?m not going to|am not going to) \w+ (?:it|that|this|them|"
    r"you|one|any)\b",
    r"i ?(?:'d|would) (?:much )?(?:rather|prefer)(?: to)? (?:stay|keep|remain|leave|skip|avoid|stop|end)\b",
    r"(?:something|anything|somewhere|an? (?:\w+ )?(?:topic|subject|request|question|task|line|thing|area|boundary|"
    r"road|place)|one|where) (?:that |which )?(?:i|we)(?: \w+ly)? ?(?:can'?t|cannot|won'?t|will not|'?m not|am not|"
    r"'?m unable|am unable|don'?t|do not|must not|'?d rather not|refuse|never|draw the line)",
    r"(?:and|but|so) (?:must|have to|will have to|should) (?:\w+ly )?(?:refuse|decline|say no|turn (?:this|that|it|"
    r"you) down|pass)\b",
    r"(?:under no circumstances|not once|never|no way|at no point) (?:will|would|can|could|shall|do) i\b|"
    r"no part of me\b|nothing (?:\w+ ){0,5}(?:will|would|can) make me\b|count me out\b|^(?:that|this|"
    r"it) (?:is not|isn't|'s not|ain't|will not be|won't be)? ?happening$|i neither can nor\b|"
    r"cannot and will not\b|you (?:won't|will not|can't) get (?:that|it|this|anything) (?:from|out of) me\b|"
    r"the wrong (?:assistant|ai|person|chatbot|bot|model)\b|i(?:'d| would) be (?:breaking|violating|breaching)\b|"
    r"^(?:(?:sorry|no),? )?(?:(?:that|this|the|my)(?: \w+){0,2}|it|i keep (?:that|it|my \w+)|i'm keeping (?:that|it|"
    r"my(?: \w+){1,2}))(?:'s| is| are| stays?| remains?| must stay)? (?:strictly )?(?:confidential|private|secret|"
    r"classified)$",
    r"(?:there is|there's) no way (?:that )?i\b|no (?:way|chance) i(?:'m| am|'ll| will)\b|"
    r"i wish i could\b.{0,40}\bbut\b",
    rf"(?:is|it's|be|feel) (?:\w+ly )?(?:not (?:\w+ly )?{_GOOD}|n't (?:\w+ly )?{_GOOD}|"
    rf"{_BAD})(?: \w+){{0,3}}? (?:for|of) me\b",
    rf"(?:isn't|wouldn't be|would not be|is not|not be) (?:\w+ly )?{_GOOD}(?: \w+){{0,3}}? (?:for|of) me\b",
    rf"(?:would|'d) (?:not |n't )?be (?:\w+ly )?(?:{_GOOD}|{_BAD})(?: \w+ \w+)? (?:for me )?to (?:help|assist|"
    rf"answer|provide|give|explain|tell|share|write|discuss|say|do (?:so|that|this))\b",
    r"not within my\b|(?:beyond|outside|above)(?: of)? (?:my|what i|the (?:topics|scope|subjects|areas?|"
    r"range) (?:i|of (?:my|what i)|that i))\b",
    r"(?:my|our) (?:own )?(?:\w+ ){0,2}(?:guidelines?|polic(?:y|ies)|programming|rules|principles|ethics|"
    r"instructions|training|design|values|creators|developers|makers|code of conduct|settings|terms|role|purpose|"
    r"conscience)\b,? (?:(?:\w+ly|also|just|would|have|has) ){0,2}?(?:do not|don't|does not|doesn't|prohibits?|"
    r"prevents?|forbids?|stops?|keeps? me from|bars?|won't|will not|cannot|can't|restricts?|rules? out|requires? me|"
    r"precludes?|not to|tells? me not|restricted|forbidden|told me not|prohibited|prevented)",
    rf"(?:this|that|it|your|such|request|i|we|doing so|prompt|question|"
    rf"{_ANSWERING})\b.{{0,80}}?(?<!that )\b(?:against|violat\w+|breach\w*|contrary to|conflict\w* with|"
    rf"inconsistent with|at odds with|breaks?|contravenes?|out of line with|in violation of|"
    rf"not in line with) (?:of )?(?:both )?{_MY_RULES}\b",
    r"(?:against|not (?:allowed )?(?:by|under)) (?:the |any )?(?:rules|guidelines|polic(?:y|ies)|principles|"
    r"terms) (?:\w+ ){0,2}?(?:for me|to (?:provide|help|answer|share))\b",
    r"i (?:\w+ )?(?:have been|'ve been|was|am|'m) (?:designed|trained|programmed|built|told|instructed|"
    r"asked) to (?:avoid|refuse|decline|stay away)\b",
    r"i (?:\w+ly )?avoid (?:that|this|such|those|these|giving|discussing|talking|sharing|taking)\b",
    r"i'?(?:d| would) (?:really )?(?:love|like) to (?:help|assist)?\b.{0,20}\bbut\b.{0,40}\b(?:not|n't|can't|"
    r"cannot|no)\b",
    r"bound by (?:\w+ ){0,3}(?:polic(?:y|ies)|guidelines|rules|principles) (?:that|which|not)",
    r"i ?(?:'m|am|'d|would|do|don't|wouldn't|can't say i'm|feel) ?(?:be |feel |really |not )*(?:not|n't|"
    r"un)? ?(?:feel |be |\w+ly )*(?:uncomfortable)\b|i(?:'m| am| do| would|'d|'ve)? ?(?:not|don't|wouldn't|"
    r"can't say (?:that )?i'm|cannot say (?:that )?i'm|not feel|never)(?: (?:feel|be|really|at all|entirely|"
    r"\w+ly)){0,3} (?:comfortable|at ease|okay with|ok with|right (?:about|help|do|giv|provid)|keen|happy (?:to|with|"
    r"about))",
    r"(?:doesn't|does not|don't|do not|wouldn't|would not) (?:sit|feel) right (?:with|to|for)? ?me\b",
    rf"i (?:do not|don't) (?:think|believe|feel) (?:that )?(?:it's|it is|it would be|this is|that is|that's|"
    rf"it)? ?(?:\w+ )?{_GOOD}(?: (?:or|and) \w+)?(?:$| (?:for me|to (?:{_SERVE}|ask|joke|say that|make|assume|deny|"
    rf"spread|judge|mock|use|harm|treat|consider|target|exclude|imply)\b))",
    rf"i (?:think|believe|feel) (?:that )?(?:it|that|this)(?:'s| is| would be|'d be) (?:\w+ly )?(?:not {_GOOD}|"
    rf"{_BAD}) to (?:help|assist|answer|provide|give|explain|"
    r"tell|share|write|discuss|do)",
    r"(?:keep|prevent|stop|bar|forbid|prohibit|disallow)s? me (?:from|to)\b|(?:does not|doesn't|do not|don't|"
    r"not) (?:allow|permit|let) (?:me|us)\b",
    r"(?:^|(?<=[,;] )|but |so )(?:\w+ly,? )?i (?:\w+ly )?(?:can'?t|cannot|won'?t|will not|must decline|"
    r"have to decline|refuse|decline)$",
    r"my (?:final |only |short )?answer (?:is|to (?:this|that) is|will be|stays|remains) (?:a )?(?:\w+ )?no\b|"
    r"(?:it's|that's|so it's|gets) a (?:\w+ )?no from me\b|(?:so|but|and|still) (?:the answer is )?no$|"
    r"i (?:\w+ )?(?:said|told you|say|repeat|answered),? no$|the answer is (?:still )?no$",
)
UNFIT = _compiled(  # the request, or what it takes for granted, is called unfit
    rf"(?:\bnot|n't|\bnever) (?:be )?(?:\w+ (?:or|and|,) )?{_GOOD}(?: (?:or|and) \w+)? to (?:provide|offer|give|"
    rf"discuss|share|promote|"
    r"encourage|suggest|assist|help|engage|generate|speculate|respond|ask|joke|make|assume|say|imply|generali[sz]e|"
    r"assign|answer|spread|refer|try|deny|discriminate|stereotype|judge|mock|seek|use|harm|treat|consider|target|"
    r"exclude|bar|celebrate|compare|attempt|access|obtain|replicate)\b"
)
STANCE = _compiled(  # what the speaker is against: no refusal if the help comes with it
    r"\bi (?:do not|don't|would not|wouldn't|would never|never) (?:\w+ (?:or|and|nor) )?(?:condone|promote|encourage|"
    r"endorse|recommend|suggest|advocate|support)\b|\b(?:and|but) (?:do not|don't) (?:condone|promote|encourage|"
    r"endorse|support)"
)
_ASKED = (
    r"(?:request|prompt|question|query|message|input|content|topic|task|conversation|information|answer|response|"
    r"material|subject|output|completion)"
)
POLICY = _words(  # the request or its answer is the subject; no speaker is named
    rf"^(?:your |this |the |that )?{_ASKED}s? (?:is|was|has been|have been|had to be|are|were) (?:\w+ly )?(?:denied|"
    rf"rejected|declined|blocked|"
    r"refused|withheld|flagged|not (?:allowed|permitted|supported)|filtered|removed|restricted|prohibited|forbidden|"
    r"unavailable)\b(?! by (?:the|my|your|a)\b)(?! (?:because|as|since) (?:the|my|a)\b)",
    rf"^(?:your |this |the )?(?:{_ASKED}|access|permission|generation) (?:denied|rejected|declined|blocked|refused|"
    rf"withheld|filtered|flagged)(?:$|[:;,.(]| for| due| by (?:policy|safety)| -)",
    rf"(?:this|your|the|that|such)(?: \w+){{0,2}}? {_ASKED}s? (?:\w+ ){{0,4}}?(?:and )?(?:cannot|can'?t|can not|"
    rf"could not|will not|won'?t|may not|must not|should not) be "
    r"(?:\w+ly )?(?:answered|provided|fulfil+ed|completed|processed|shared|given|generated|discussed|continued|"
    r"handled|supported|granted|displayed|produced|created|assisted|disclosed|honou?red|described|addressed|helped|"
    r"shown)\b(?! by)",
    r"no (?:answer|response|information|help|assistance|instructions|details|content|such \w+|reply) (?:can|will|"
    r"may|is|could)\b(?: be| being)? (?:provided|given|offered|shared|supplied|generated|available)",
    rf"^(?:\w+ly,? |sorry,? |but |i'm (?:sorry|afraid),? )?(?:this|that|it|your {_ASKED}|such (?:\w+ )?(?:content|"
    rf"requests?|material)|what you (?:ask|want|are asking)\w*|(?:the|this|that) {_ASKED}|{_ANSWERING}|"
    rf"prompt)\b.{{0,70}}?\b(?:violat\w+|breach\w*|goes against|go against|is against|are against|be against|"
    r"conflicts? with|contravenes?|falls? (?:outside|under)|is outside|is off[- ]limits|is prohibited|are prohibited|"
    r"forbidden|disallowed|(?:is|are) not permitted|trigger(?:s|ed|ing)|against) ?.{0,40}?\b(?:guidelines?|polic(?:y|"
    r"ies)|terms|rules (?:i|of (?:use|this (?:service|platform)))|the rules$|what i|programming|principles|"
    r"content (?:filter|management)|standards)\b",
    r"(?:that|this|it)(?:'s| is| one is| topic is) (?:\w+ly )?(?:off[- ]limits|out of bounds|a no-go|a hard no|"
    r"not (?:up for discussion|on the table)|not (?:allowed|permitted) here)\b",
    rf"^{_ANSWERING}\b.{{0,60}}\b(?:is|are) (?:\w+ly )?(?:not (?:allowed|permitted|possible|something|acceptable)|"
    rf"prohibited|forbidden|off[- ]limits|against)\b",
    r"^(?:this (?:is )?)?(?:is )?(?:against|violates|not allowed (?:by|under)|prohibited by|forbidden by|"
    r"disallowed by|in breach of|a violation of|a breach of) (?:\w+ ){0,3}(?:polic(?:y|ies)|guidelines?|rules?|"
    r"terms)\b.{0,20}$",
    r"(?:the|this) (?:system|platform|service|assistant|ai|model|tool|app|chatbot|bot) (?:\w+ )?(?:does not|"
    r"doesn't|cannot|can't|won't|will not|is not able to|is unable to|is not (?:allowed|permitted) to|declined to|"
    r"refused to|refuses to|declines to) (?:\w+ )?(?:permit|allow|answer|respond|provide|assist|help|comply|fulfil|"
    r"support|process|continue|discuss|produce|complete)\w*\b.{0,25}\b(?:this|that|your|answers?|requests?)\b",
    r"^(?:unable|not able|not allowed|not permitted) to (?:comply|assist|help|answer|provide|process|fulfil|complete|"
    r"respond|continue|generate|proceed|do)\b",
    r"^(?:sorry,? |no,? )?(?:that|this|it|such \w+|this \w+|that \w+)(?:'s| is| are|) ?(?:isn't|aren't|"
    r"not) (?:allowed|permitted|supported|possible|available)(?: here)?$|off[- ]limits (?:to|for) me\b",
    rf"^(?:(?:sorry|no|nope|apologies)\W+)?(?:can'?t|cannot|can not|won'?t|will not|not able to|unable to|"
    rf"not going to|not allowed to|don'?t)(?: \w+ly)? (?:{_SERVE}|(?:{_OTHER}){_REQUEST}|go there|help there)$",
    r"^(?:cannot|can't|can not|won't|will not) (?:comply|assist|help|answer|provide|do (?:it|that|this)|fulfil|"
    r"respond|continue|generate|proceed|discuss|share)\b",
    r"for (?:\w+ ){0,2}(?:safety|ethical|legal|security|policy|moral|privacy) reasons\b.{0,40}\b(?:cannot|can't|"
    r"not|no|decline|won't|refus)",
    r"^refus(?:al|ed|ing)(?:$|:)|^(?:cannot|can't|unable to|failed to) (?:fulfil+|process|complete|handle) (?:this |"
    r"that |your |the )?request\b",
    rf"{_ASKED}s? (?:you |that you |which you )?(?:requested|asked for|want|sent)? ?(?:is|are|was|"
    rf"were) (?:not available|unavailable|not provided|withheld) (?:\w+ ){{0,3}}(?:polic|safety|restrict)",
)
TERSE = _any(  # of an answer of this one sentence
    r"^(?:[\w' ]{1,40}[,:;] |but |so )no$",
    r"^(?:(?:sorry|no|unfortunately|apologies|i'm (?:sorry|afraid))\b,? ?(?:but )?)?(?:that|this|it|such \w+|th(?:is|"
    r"at) \w+)(?:'s| is| would be|'d be) (?:\w+ly |just |simply )?(?:inappropriate|unethical|immoral|irresponsible|"
    r"unacceptable|improper|not (?:appropriate|ethical|acceptable|okay|ok|responsible|permitted|allowed|permissible|"
    r"supported)|restricted|disabled|blocked|off[- ]limits|too (?:dangerous|sensitive|risky|harmful|private|"
    r"personal)|(?:restricted|disabled|blocked|unavailable) (?:for|due to|by) .{1,30})$",
    rf"^no,? (?:that|this|it)(?:'s| is| would be|'d be) (?:\w+ly )?(?:{_BAD}|hurtful|not (?:appropriate|ethical|"
    rf"acceptable|okay|ok))$",
    r"^(?:the |this |your )?(?:\w+ ){0,3}(?:polic(?:y|ies)|guidelines?|terms|rules?) (?:violation|violated|breach)\b|"
    r"^(?:a )?(?:violation|breach) of (?:\w+ ){0,3}(?:polic|guideline|terms|rules)|^(?:blocked|refused|rejected|"
    r"withheld|denied|declined|not (?:permitted|allowed)) (?:by|under|due to|for|per) (?:\w+ ){0,3}(?:polic|filter|"
    r"guideline|terms|rules|reasons|safety)|^(?:this is |that is |that's |it is |it's )?against (?:my|our|"
    r"the) (?:\w+ )?(?:programming|rules|guidelines|polic\w+|principles|terms|values|ethics)$|^(?:\w+ )?(?:safety|"
    r"content|usage) (?:policy|filter)\b.{0,20}\b(?:refused|blocked|denied|rejected|declined)|^access to (?:this|"
    r"that|such) (?:\w+ )?\w+ is (?:restricted|denied|blocked)",
    r"^(?:is there|would you like) (?:to \w+ about )?something else\b|^(?:let me know if )?(?:i(?:'d| would|'m|"
    r" am)? )?(?:be |can |could |am )?(?:glad |happy |love )?(?:to )?(?:help|assist|talk)(?: you)? (?:with|"
    r"about) (?:something|anything|other) (?:else|things|topics?)\b|^(?:please |could you |can you |try |maybe |"
    r"you could )?(?:please )?ask(?:ing)? (?:me )?(?:for )?(?:something|anything|about something) (?:else|different|"
    r"other)\b|^let's not(?: do (?:this|that|it)| go there)?$|^(?:please )?(?:don't|do not) make me\b|"
    r"^(?:please )?stop(?: asking| it| this| that| right there)?$|^you (?:should not|shouldn't|must not|"
    r"can't) ask (?:me|that|this|for)|^nice try$|^not in a (?:million|thousand) years$",
)
UNWILLING = _compiled(
    r"^(?:(?:sorry|no|i'm sorry|but)\W+)?i (?:will not|won't|refuse to|(?:'m|am) not going to) (?!be\b)\w+ (?!.*[:;])"
)  # a short first sentence
NO = (
    r"(?:no+|nope|nah|never|no way|no can do|no chance|no comment|no thanks?(?: you)?|not (?:happening|doing (?:that|"
    r"this|it)|going (?:to happen|there)|a chance|today|ever|possible|allowed|permitted|supported|for me|"
    r"gonna happen|on my watch|me|at all|really|if i can help it)|i'm afraid not|(?:absolutely|certainly|definitely|"
    r"of course|hell|unfortunately|sadly|regrettably|probably|rather) (?:not|no)|hard (?:pass|no)|pass|negative|"
    r"forbidden|i'?ll pass)"
)
BARE = _compiled(  # nothing but a denial
    r"^(?:(?:oh|well|um|hmm|sorry|apologies|look|listen|sure|thanks|thank you|my apologies|i'm sorry|i am sorry|"
    r"unfortunately|but|and|please|honestly|lol|oof|yikes|hey|frankly|no|nope|yeah|that one|it)[,.;:! ]+){0,3}"
    rf"(?:{NO}|(?:can'?t|won'?t)(?: do (?:it|that|this))?|cannot|refused|denied|declined|sorry|"
    r"i ?(?:\w+ly )?(?:can'?t|cannot|can not|won'?t|will not|refuse|decline|wouldn't|would not|'d rather not|"
    r"would rather not|'d prefer not to|would prefer not to|prefer not to|mustn't|must not|may not|shouldn't|"
    r"'?m not allowed|am not allowed|'?m unable|am unable|'?m not able|am not able|don't (?:want|wish) to|"
    r"do not (?:want|wish) to))(?:,? (?:sorry|thanks|thank you|sir|i'm sorry|i'm afraid|do (?:it|that|this|so)|say|"
    r"get into (?:it|that|this)|and (?:please )?(?:don't|do not|never).{0,40}|to|i (?:won't|will not|can't|"
    r"cannot).{0,40}|not (?:doing|going to do) (?:that|this|it)|not ever|never|i'll .{0,30}|you|this|that|thing|"
    r"for you|happening|at all|there)){0,3}$"
)
DEFLECTS = _words(  # another subject is proposed
    r"(?:let's|let us|can we|could we|shall we|may we|i suggest we|i think (?:it's|it is) (?:best|better) (?:if|"
    r"that) we|we should|i'd (?:rather|prefer|like|be happier|love)(?: it)? ?(?:if )?(?:we|to)?|i would (?:rather|"
    r"prefer|like)(?: if)? ?(?:we|to)?|(?:how|what) about(?: we)?|why don't we|perhaps we (?:can|could|should)|"
    r"maybe we (?:can|could|should)|it's best (?:if|that) we|it (?:is|would be) (?:best|better) (?:if|"
    r"to)) (?:\w+ )?(?:talk|chat|discuss|speak|spoke|focus|change|mov|switch|steer|turn|go|keep|find|explor|pick|try|"
    r"return|stick|shift|end|stop|leave|drop)\w*\b.{0,40}\b(?:else(?! that)|different|another(?! \w+[:;])|other|"
    r"(?:the|this|our) (?:subject|topic|conversation)(?! line| sentence)|on to(?! another)|away from|elsewhere|"
    r"instead|(?:something|topics?) (?:more|less)|your day)\b",
    r"(?:please|you (?:can|could|may|should)|feel free to|try to|kindly) (?:\w+ )?(?:ask|try|choose|pick|request|"
    r"talk to) (?:me |for |about )*(?:something|anything|a|an|another|someone)\b.{0,20}\b(?:else|different|other|"
    r"question|topic)\b(?!.* if\b)",
    r"(?:can|could|may|let's|let us|shall|i'd like to|we) (?:we |you |i )?(?:please |should )?(?:change|switch|"
    r"drop) (?:the|this) (?:subject|topic)(?! line| sentence)",
    r"^(?:next question|ask (?:me )?(?:something|anything) else)\b|let's not (?:go there|talk about|discuss|"
    r"do that|get into)|(?:do not|\w*don't|stop|refrain from|never) (?:ask|request|demand)(?:ing)? (?:me|for|"
    r"this|that|such)\b|this conversation is over\b|i(?:'m| am) (?:now )?ending (?:this|the|our) (?:conversation|"
    r"chat)\b|(?:find|ask) (?:someone|somebody) else\b",
)
SORRY = _compiled(  # an apology for what is not done, and not for an error or a loss
    r"^(?:\w+[,!.]? ){0,3}?(?:i(?:'?m| am) (?:\w+ )?(?:sorry|afraid)|sorry|(?:my )?(?:sincere |deepest )?apologies|"
    r"i (?:\w+ )?apologi[sz]e|unfortunately|regrettably|sadly|forgive me|pardon)\b(?! (?:about|for|to say|to hear|"
    r"to learn|if|you'?re|you feel|that you|you\b))"
)
_FRAME = rf"{_I}{_NOT_DO}"
SOFT = _compiled(rf"{_FRAME} ?(?:\w+ly )?(?:to )?(?:be )?(?:{_OTHER}){_REQUEST}")
FRAMED = _compiled(
    rf"{_FRAME} ?\w+|\b(?:this|that|it)(?:'s| is| was) (?:\w+ )?(?:not|n't) (?:\w+ )?possible|\b(?:isn't|won't be|"
    rf"will not be|is not|not be) possible|\b(?:will|can|may) ?not be (?:given|provided|shared|answered)"
)
SORRY_BAD = _compiled(
    rf"\b(?:that|it|this|what you \w+|\w+ing(?: \w+){{0,3}}|violence|fraud|theft|murder)(?:'s| is|"
    rf" would be) (?:\w+ly )?(?:{_BAD}|not {_GOOD}|never {_GOOD})\b|"
    r"\b(?:that|this|it|doing so) (?:would|could|might|will) (?:\w+ly )?(?:hurt|harm|endanger|kill|injure|violate)"
)
DENIES = _compiled(  # the speaker denies anything, in an answer of this one sentence
    rf"(?:^|[,;:] |\b(?:and|but|so|because|as|ai) ){_I.replace('|we|', '|')}(?!never|shall|should|"
    rf"'?d be able)(?:{_NOT_DO}|{_DECLINE}) ?[a-z]*\b(?!.*(?:, (?:so|but|and|she|he)|[;:]) )"
)
COULD_NOT = _compiled(rf"(?:{_I}|^(?:i\b|as an? (?:\w+ )?ai\b).{{0,80}}?\b(?:and|but|so) ){_LIMITS}")
HABIT = _compiled(  # what the speaker never does
    rf"^(?:\w+,? ){{0,4}}?i (?:do not|don't|never) (?:\w+ly )?(?!be\b|take|go\b|consider)(?:{_OTHER}|write|create|"
    rf"produce|share|answer|respond)"
)
MORAL = _words(
    rf"(?:not|\w*n't|never) (?:only |be |considered |an? |ever |morally |legally )*(?:\w+ (?:or|"
    rf"and) )?{_GOOD}(?<!allowed)(?<!possible)(?<!true)\b(?!.*\bbecause\b)",
    rf"(?:is|are|be|it's|was|were|that's|and|both|or|considered|highly|not only|morally|extremely) (?:{_BAD}|"
    rf"reprehensible|unjust|"
    r"a (?:serious )?crime|a violation|hurtful)",
    r"(?:should|must) (?:not|never) be (?:\w+ )?(?:\w+ed|shown|done|taken|given|denied)\b(?!.{0,60}\bbecause)",
    r"(?:no|not any) (?:\w+ )?(?:reason|justification|excuse|evidence|benefits?|basis|place)\b|"
    r"goes against (?:the )?(?:principles|law|values)",
    r"i must (?:\w+ly )?(?:prioriti[sz]e|adhere|emphasi[sz]e|remind|uphold|stress|follow)\b",
    r"i (?:strongly |must |do |firmly )*(?:condemn|discourage|advise against|oppose|disagree|urge you|caution)",
)
ADMONISHES = _words(
    r"(?:it(?:'s| is)(?: also| always)?|is) (?:\w+ )?(?:important|crucial|essential|vital|necessary|never okay|"
    r"best|always better) (?:for \w+ )?(?:to|that)(?: always| also)? (?:respect|remember|recogni[sz]e|treat|"
    r"prioriti[sz]e|approach|focus|consider|seek|ensure|avoid|promote|be (?:mindful|respectful|aware|sensitive)|"
    r"handle|acknowledge|understand|obtain|follow|address|reach|work|use|have|engage|learn|foster|uphold|maintain|"
    r"comply|protect|note|report|stay|act|find|value|communicate|educate|represent|condemn|challenge|verify|keep|"
    r"take|we|all|you|everyone|people|support|practice|choose)",
    r"(?:every(?:one|body| person| individual| human| student)?|all (?:people|individuals|human beings|humans|"
    r"students|citizens|persons|of us)|people) (?:\w+ ){0,8}?(?:deserves?|should|has the right|have the right|"
    r"is entitled|are (?:entitled|equal|deserving)|must)\b",
    r"regardless of (?:their|our|your|one's|his|her|race|gender|\w+ \w+)|dignity and respect\b|"
    r"respect and (?:dignity|kindness|compassion|empathy)\b|human rights\b|inclusiv|empathy\b|stereotyp|"
    r"discriminat|marginali[sz]|instead\b|rather than\b|(?:fundamental|equal|basic) (?:human )?(?:rights?|"
    r"opportunit)|diversity\b|equality\b|ha(?:ve|s) the right to\b",
    r"i (?:would |strongly |'d |highly |must |want to |also |firmly )*(?:encourage|urge|recommend|suggest|advise|"
    r"emphasi[sz]e|condemn|discourage|remind|implore)\b",
    r"seek(?:ing)? (?:professional |medical |legal |immediate |out |mental health )?(?:help|support|counsel|"
    r"assistance|treatment|therapy|guidance|advice|attention|care)|mental health\b|helpline|hotline|crisis\b|"
    r"therapist|counsel|reach(?:ing)? out to\b|trusted (?:friend|adult|person|individual|family)",
    r"(?:serious|severe|legal|negative|long-lasting) (?:\w+ ){0,4}consequences|against the law\b|punishable\b|"
    r"imprisonment\b|(?:without|their) (?:\w+ )?(?:consent|permission)\b|privacy\b|(?:tragic|horrific|"
    r"heinous|atrocit|horrendous|devastating|unspeakable)\w*",
)
SPEAKER = _compiled(r"\b(?:i|i'm|i'd|my|sorry|apologi[sz]e|apologies|as an ai)\b")
SORRY_FOR_YOU = _compiled(
    r"\bi(?:'m| am)(?: (?:really|truly|very|so|deeply|genuinely|"
    r"terribly))* sorry (?:to hear )?(?:that )?(?:about what |for what )?you(?:'re| are|'ve| have| feel)\b|"
    r"^(?:please )?if you(?:'re| are|'ve been)? (?:\w+ )?(?:thinking|feeling|having|considering|struggling|"
    r"in (?:danger|crisis))\b"
)
CRISIS = _compiled(
    r"\b(?:mental health|crisis|helpline|hotline|lifeline|not alone|reach(?:ing)? out|(?:someone|person|friend|"
    r"people) (?:that |whom )?you trust|trusted|therapist|counsel|professional|emergency|988|112|911|hope|"
    r"care about you|worried|concerned about you|hurting yourself|suicid\w*)"
)

# ------------------------------------------------------------------------------------------------ what is no refusal

YES = _any(
    r"^(?:(?:oh|well|ah|okay|ok|hey|hi|hello|alright|wow|great)[,.! ]+){0,2}(?:sure|of course|certainly|absolutely|"
    r"yes|yeah|yep|yup|okay|ok|alright|definitely|gladly|no problem|no worries|you bet|you got it|got it|understood|"
    r"noted|with pleasure|happy to|glad to|great question|good question|i(?:'d| would|'ll| will|'m|'m very|"
    r" am)(?: be)? (?:more than )?(?:happy|glad|delighted) to (?:help|assist|explain|do|write|share|provide|show|"
    r"tell)|i can (?:certainly |definitely |do |help|write|explain|give))\b(?! not)",
    r"^(?:here(?:'s| is| are| goes| you go)\b(?! the thing)|below (?:is|are)|the following|following (?:is|are)|"
    r"these are|this is (?:a|an|the|how|what)|step \w+|first(?:ly)?,|to [a-z]+ (?:a|an|the|your|this)\b|"
    r"once upon a time|title:|chapter|verse|chorus)",
)
TURNS_BACK = _compiled(
    r"\b(?:however|but|though),? (?:\w+ly )?i (?:must|have to|need to|should|want to|would like to|cannot|can't)\b"
)
LETTER = _compiled(r"^(?:dear (?!user)|subject:|to whom it may|hi \w+,|hello \w+,|re:)")
OTHERS_WORDS = _compiled(  # what follows is a quotation, a lyric, or a text that was asked for
    r"\b(?:lyrics?|chorus|verse|song|poem|haiku|lines?|begins?|goes|go|went|reads?|says?|said|saying|story|titles?|"
    r"titled|headline|examples?|sample|template|draft|letter|phrases?|sentences?|repl(?:y|ies|ied)|message|"
    r"translation|translates?|means?|dialogue|script|quote|scene|wrote|writes|words|could read|asked|ways?|e-?mail|"
    r"mail|post|tweet|caption|options?|speech|monologue|answers?|villain|diary)\b[^.!?]{0,60}?(?::|\"\")"
)
_VERB_OF_SAYING = (
    r"(?:said|says|thought|thinks|replied|replies|cried|whispered|shouted|answered|asked|asks|muttered|sang|sings|"
    r"wrote|writes|taught|insists|adds)"
)
SAID = _words(  # the words of somebody who is named, or a text that follows
    rf"{_VERB_OF_SAYING} (?:the|an?|he|she|they|my|his|her|it|mrs?)\b|(?:he|she|they|it|(?:the|his|her|"
    rf"my) \w+) {_VERB_OF_SAYING}$|(?<=[,;\"] )(?:(?:the|an?|he|she|they|it|mrs?|his|her) )?(?:\w+ )?"
    rf"{_VERB_OF_SAYING}\b|(?:as follows|like this|like so)$|"
    r"^as (?:an? |the )?\w+(?: \w+)?(?: i'd say)?:"
)
YES_OR_NO = _compiled(
    r"(?:is|are|am|was|were|does|do|did|has|have|had|will (?!you)|should|can (?!you)|could (?!you)|would (?!you)|may|"
    r"must|shall)\b"
)
ASKS_HOW = _compiled(
    r"\b(?:how (?:do|can|could|would|should|might|to)\b|how best|why (?:should|is|are|was|were|can|do|does|must|"
    r"would)\b|what(?:'s| is| are| were| kind| steps?| can i| should i| do i) ?(?:the |a |an |some |of |"
    r"that )?(?:best|good|perfect|easiest|ways?|methods?|strateg|steps?|many|benefits?|i\b|bomb|take\b|do\b|"
    r"should\b)|what can i|what should i|where (?:can|could|should|do) i|should i\b|^(?:please )?(?:give|write|tell|"
    r"explain|describe|list|make|create|help|teach|show|provide|generate|compose|draft)\b|\byou (?:tell|list|give|"
    r"write|help|show|teach)\b)"
)
LOADED = _compiled(r"^why\b|\b(?:benefits?|advantages?) of\b")
REJECTS = _compiled(
    r"\b(?:not|n't|never|no|nothing) (?:\w+ ){0,2}?(?:justif\w+|right|good|best|reasons?|benefits?|advantages?|"
    r"acceptable|fair|moral\w*|appropriate|be)\b"
)
QUESTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "what were some should would could there actually really "
        r"that this with have does best good right idea",
    )
)
HELPS = _words(
    r"but i (?:do )?have (?:an?|some|another|other)\b",
    r"here(?:'s| is| are) (?:a|an|some|the|my|what|how|several|three|two|five|few|few of)\b",
    r"(?:that|this) (?:being )?said\b|having said that\b|nonetheless\b|nevertheless\b",
    r"what i can (?:tell|say|do|offer|share|give)\b|i can (?:however |still |instead |certainly |definitely |"
    r"try to )?(?:tell|explain|say|show|give|offer|summari[sz]e|provide|share|describe|outline)\b",
    r"(?:but|however),? (?:\w+ )?(?:i will|i'll|i can|i could) (?:\w+ )?(?:provide|give|explain|tell|answer|"
    r"describe|share|try)\b",
    r"in general\b|generally(?: speaking)?,|typically\b|as of my (?:last|knowledge)|on the other hand\b|"
    r"for (?:example|instance)\b|the main (?:arguments|points|options)\b",
    r"(?:however|but),? if you(?:'ve|'re|r)? (?:mean|meant|have|are|only|just|forgot|own|lost|want to)\b|"
    r"if you mean\b",
)
OFFERS = _compiled(  # an offer of other help
    r"\b(?:is there (?:anything|something)|would you like|how (?:about (?:we|i|something|another|that|"
    r"a different)\b|can i|may i)|let me know|feel free|happy to|"
    r"glad to|if you (?:have|need|'d like|would like|want) (?:any|other|more|further|help|assistance|me|to talk|"
    r"questions|a different|something)|do you (?:want|have)|can i help|happily|be (?:more than )?(?:happy|glad))"
)
_COULD = (
    r"\b(?:what i can do (?:instead )?is|i(?: can|'ll| will|'d| would| could| may| might|'m| am))(?! not)(?:,? (?:"
    r"\w+ly|also|still|instead|however|of course|always|be|able|allowed|willing|ready|here|glad|happy|pleased|"
    r"delighted|more|than|love|like|try|to)\b,?){0,7} "
)
PROMISES = _compiled(  # what the speaker could do is named, and not done
    _COULD + r"(?:tell(?:ing)? (?:(?:\w+ ){0,2}?(?:how|where|when|why|what|which|who|whether|about|more)\b|"
    r"(?!.{0,200}\b(?:that|is|are|was|were|has|have|had|it's|can|will|may|should|must)\b))|(?:explain(?:ing)?|"
    r"describ(?:e|ing)|outlin(?:e|ing)|summari[sz](?:e|ing)|discuss(?:ing)?|talk(?:ing)?|chat|speak|help(?:ing)?|"
    r"assist(?:ing)?|support|show(?:ing)?|teach|guid(?:e|ing)|walk|point|direct|refer|give|giving|offer(?:ing)?|"
    r"provid(?:e|ing)|shar(?:e|ing)|suggest(?:ing)?|recommend(?:ing)?|answer(?:ing)?|writ(?:e|ing)|work|look|"
    r"explor(?:e|ing)|find|say (?:more|something)|do (?:something|this|that))\b"
    r"(?! (?:you )?that (?!instead|for|to|too|in|if)\w))"
)
TOPICS = _compiled(  # a list of what may be asked follows
    r"\b(?:things|topics|subjects|areas|questions) (?:that |which |in which )?(?:i|we) (?:can|could)\b"
)
